"use strict";

// ---- tables: a click on a heading sorts by it, another one turns the order round; empty cells stay last
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? direction : "none");
      const sign = direction === "ascending" ? 1 : -1;
      const order = (row) => row.cells[column].dataset.order;
      const compare = (first, second) => {
        const [a, b] = [order(first), order(second)];
        if (a === "" || b === "") return (a === "") - (b === "");
        const numbers = !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
        return sign * (numbers ? Number(a) - Number(b) : a.localeCompare(b));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// ---- the layer slider
(() => {
  const source = document.getElementById("slider-data");
  if (!source) return;
  const { palette, records } = JSON.parse(source.textContent);
  const at = (id) => document.getElementById(id);
  const colours = palette.map((hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
  const percent = (value) => `${(100 * value).toFixed(1)}%`;
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  let record = null;

  const left = (layer) => record.exit_layer !== null && layer >= record.exit_layer;

  function describe(layer) {
    const last = record.mass.length;
    const sentences = [`Layer ${layer} of 0 to ${last - 1}: ${percent(record.mass[layer])} of the attention is on ${record.part || "the image"}.`];
    if (left(layer)) sentences.push(`The gates took the image out after ${record.exit_layer} ${record.exit_layer === 1 ? "layer" : "layers"}, so this layer would not see it; the map shows the full model.`);
    const gate = record.gates[String(layer + 1)];
    if (gate && !left(layer)) sentences.push(`The gate after this layer says exit with probability ${gate[0].toFixed(2)} (threshold ${gate[1].toFixed(2)}).`);
    const answer = record.answers[String(layer)];
    if (answer !== undefined) sentences.push(`If the image left before this layer, the answer would be “${answer}”.`);
    return sentences.join(" ");
  }

  function drawMap(layer) {
    const canvas = at("map");
    const context = canvas.getContext("2d");
    canvas.width = record.columns;
    canvas.height = record.rows;
    const pixels = context.createImageData(record.columns, record.rows);
    record.maps[layer].forEach((value, index) => {
      const share = Math.min(value / record.top, 1);
      const colour = colours[Math.round(share * (colours.length - 1))];
      pixels.data.set([...colour, Math.round(255 * share ** 0.75)], 4 * index);
    });
    context.putImageData(pixels, 0, 0);
    const peak = record.maps[layer].indexOf(Math.max(...record.maps[layer]));
    const place = `row ${Math.floor(peak / record.columns) + 1} of ${record.rows}, column ${(peak % record.columns) + 1} of ${record.columns}`;
    canvas.setAttribute("aria-label", `Attention map of layer ${layer}: strongest at ${place}, ${record.maps[layer][peak]} times an even spread`);
  }

  // what the patch under the pointer says: the final norm and the output embedding, applied to its state
  function say(event) {
    if (!record.says.length) { at("said").textContent = ""; return; }
    const layer = Number(at("layer").value);
    const box = at("photo").getBoundingClientRect();
    const column = event ? Math.floor(((event.clientX - box.left) / box.width) * record.columns) : -1;
    const row = event ? Math.floor(((event.clientY - box.top) / box.height) * record.rows) : -1;
    const inside = row >= 0 && row < record.rows && column >= 0 && column < record.columns;
    const word = inside ? record.words[record.says[layer + 1][row * record.columns + column]] : "";
    at("said").textContent = inside
      ? `Row ${row + 1}, column ${column + 1} says “${word}” after layer ${layer} (logit lens).`
      : "Point at a patch to read what its state says after this layer (logit lens).";
  }

  function drawBars(layer) {
    const [width, height, base] = [320, 96, 80];
    const most = Math.max(...record.mass, 1e-9);
    const step = width / record.mass.length;
    const bars = at("bars");
    bars.replaceChildren();
    const hatch = svg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    hatch.append(svg("line", { x1: 0, y1: 0, x2: 0, y2: 6, stroke: "#9aa3ad", "stroke-width": 2 }));
    bars.append(hatch);
    if (record.exit_layer !== null && record.exit_layer < record.mass.length) {
      const start = record.exit_layer * step;
      bars.append(svg("rect", { x: start, y: 0, width: width - start, height: base, fill: "url(#hatch)", opacity: 0.6 }));
      bars.append(svg("line", { x1: start, y1: 0, x2: start, y2: base, stroke: "#1b1f24", "stroke-width": 1.5 }));
    }
    record.mass.forEach((mass, index) => {
      const tall = (base - 6) * (mass / most);
      const chosen = index === layer;
      bars.append(svg("rect", { x: index * step + step * 0.15, y: base - tall, width: step * 0.7, height: Math.max(tall, 1), fill: chosen ? "#c65911" : "#1f3a5f", stroke: "#fff", "stroke-width": 0.5 }));
      const whole = svg("rect", { x: index * step, y: 0, width: step, height, fill: "transparent" });
      whole.addEventListener("click", () => { at("layer").value = index; draw(); });
      bars.append(whole);
      if (index % Math.ceil(record.mass.length / 16) === 0 || chosen) {
        const label = svg("text", { x: (index + 0.5) * step, y: height - 3, "text-anchor": "middle", "font-size": 10, "font-weight": chosen ? 700 : 400, fill: "#1b1f24", "pointer-events": "none" });
        label.textContent = index;
        bars.append(label);
      }
    });
  }

  function draw() {
    const layer = Number(at("layer").value);
    drawMap(layer);
    drawBars(layer);
    say(null);
    at("layer-name").textContent = layer;
    at("layer-text").textContent = describe(layer);
    at("layer").setAttribute("aria-valuetext", `layer ${layer}, ${percent(record.mass[layer])} of the attention on the image${left(layer) ? ", after the exit" : ""}`);
    at("over").classList.toggle("map", at("shown").checked);
    at("over").classList.toggle("left", left(layer));
    at("gone").hidden = !left(layer);
    at("map").hidden = !at("shown").checked;
  }

  function remember() {
    history.replaceState(null, "", `#sample=${at("sample").value}&layer=${at("layer").value}`);
  }

  function choose(index, layer) {
    record = records[index];
    const last = record.mass.length;
    at("sample").value = index;
    at("layer").max = last - 1;
    at("layer").value = layer ?? record.mass.indexOf(Math.max(...record.mass));
    at("photo").src = record.image;
    at("photo").alt = `${record.part || "Image"} of sample ${record.id}, about which is asked: ${record.question}`;
    at("top").textContent = `${record.top.toFixed(1)} or more`;
    at("question").textContent = record.question;
    at("answer").textContent = record.answer;
    at("reference").textContent = record.reference ?? "none";
    const kept = record.exit_layer === last ? `${last} (the image stays to the end)` : `${record.exit_layer} of ${last}`;
    at("exit").textContent = record.exit_layer === null ? "no gates" : `${kept}; answer with it: ${record.exit_answer}`;
    at("depth").textContent = record.exit_depth === null ? "not known" : `${record.exit_depth} (first exit layer from which answer and cross-entropy stay)`;
    draw();
  }

  function fromAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.has("sample") && !wanted.has("layer")) return false;
    const index = Math.min(Math.max(Number(wanted.get("sample")) || 0, 0), records.length - 1);
    choose(index, wanted.has("layer") ? Math.min(Math.max(Number(wanted.get("layer")) || 0, 0), records[index].mass.length - 1) : null);
    at("viewer").scrollIntoView();
    return true;
  }

  at("ramp").style.background = `linear-gradient(to right, ${palette.join(", ")})`;
  at("layer").addEventListener("input", draw);
  at("layer").addEventListener("change", remember);
  at("sample").addEventListener("change", () => { choose(Number(at("sample").value)); remember(); });
  at("shown").addEventListener("change", draw);
  for (const moved of ["pointermove", "pointerdown"]) at("over").addEventListener(moved, say);
  at("over").addEventListener("pointerleave", () => say(null));
  window.addEventListener("hashchange", fromAddress);
  at("viewer").hidden = false;
  if (!fromAddress()) choose(0);
})();
