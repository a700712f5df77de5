// Events of all parts of the page. `element` holds the part, `trigger` tells the server; both come from Gradio.
const number = (text) => (text === "" ? null : Number(text));
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const kinds = { example: "pick_example", token: "pick_token", head: "pick_head", layer: "pick_layer" };
  for (const [kind, name] of Object.entries(kinds)) {
    if (kind in button.dataset) trigger(name, { value: number(button.dataset[kind]) });
  }
});

element.addEventListener("change", (event) => {
  const field = event.target.closest("input[type=file]");
  if (!field || !field.files.length) return;
  const reader = new FileReader();
  reader.onload = () => {
    trigger("own_image", { value: reader.result });
    field.value = "";
  };
  reader.readAsDataURL(field.files[0]);
});

// A region: pressed on one patch, released on another. What the patch under the pointer says is read out.
let start = null;
const at = (cell) => [Number(cell.dataset.row), Number(cell.dataset.column)];
const under = (event) => {
  const found = document.elementFromPoint(event.clientX, event.clientY);
  return found && element.contains(found) ? found.closest(".cells i") : null;
};
const rectangle = (cell) => {
  const [first, second] = [start, at(cell)];
  return [0, 1].map((axis) => Math.min(first[axis], second[axis])).concat([0, 1].map((axis) => Math.max(first[axis], second[axis])));
};
const mark = ([top, left, bottom, right]) => {
  for (const cell of element.querySelectorAll(".cells i")) {
    const [row, column] = at(cell);
    cell.classList.toggle("marked", row >= top && row <= bottom && column >= left && column <= right);
    cell.classList.remove("chosen");
  }
};
element.addEventListener("pointerdown", (event) => {
  const cell = event.target.closest(".cells i");
  if (!cell || event.button !== 0) return;
  start = at(cell);
  mark(rectangle(cell));
  event.preventDefault();
});
element.addEventListener("pointermove", (event) => {
  const cell = under(event);
  if (!cell) return;
  element.querySelector(".readout").textContent = cell.dataset.says;
  if (start) mark(rectangle(cell));
});
window.addEventListener("pointerup", (event) => {
  if (!start) return;
  const cell = under(event);
  if (cell) trigger("pick_region", { value: rectangle(cell) });
  start = null;
});
window.addEventListener("pointercancel", () => { start = null; });
