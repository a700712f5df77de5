"""An export over an earlier one in the same folder: never a visual token, line or setting of what was there before."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dyvte.conversion import export_visual_tokens
from dyvte.conversion.exported import PROMPT_KINDS, ExportedDataset


class Small(torch.nn.Module):
    """The least that can be exported: an image becomes two visual tokens, a linear map of its mean colour."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.projector = torch.nn.Embedding(20, 4), torch.nn.Linear(3, 8)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def prepare_inputs_labels_for_multimodal(self, input_ids: Tensor, labels: Tensor, images: Any) -> Any:
        visual = self.projector(images).reshape(2, 4)
        embeddings = torch.cat([self.table(input_ids[0, :1]), visual, self.table(input_ids[0, 2:])])
        return embeddings[None], torch.cat([labels[0, :1], torch.tensor([-100, -100]), labels[0, 2:]])[None]


def export_small(folder: Path, images: Path, change: str = "", fail_at: int | None = None) -> None:
    """Export four questions on two images, one thing of them changed."""
    torch.manual_seed(0)
    model = Small(seed=int(change == "all weights"))
    if change in ("projector.weight", "projector.bias", "table.weight"):
        model.state_dict()[change].reshape(-1)[-1] += 1
    count, size = {"fewer": 2, "more": 6}.get(change, 4), {"shard size": 3, "larger shards": 9}.get(change, 2)
    for name, value in (("red", 200), ("blue", 90 if change == "image" else 80)):
        Image.new("RGB", (4, 4), (value, 30, 30)).save(images / f"{name}.png")
    texts = {key: f"other {key}" if change == key else key for key in ("question", "answer", "kind", "image_id")}
    questions = [{"id": str(n), "image": ("red.png", "blue.png")[n % 2], **texts} for n in range(count)]

    def prepare(question: dict[str, Any]) -> dict[str, Any]:
        if question["id"] == str(fail_at):
            raise OSError("interrupted")
        with Image.open(images / question["image"]) as file:
            pixels = torch.tensor(np.asarray(file), dtype=torch.float32).mean((0, 1)) / 255
        ids = torch.tensor([1, -200, 2 + len(question["question"]) % 7])
        return {"prompt": f"<image>{question['question']}", "input_ids": ids, "images": pixels, "picture": None}

    pair = ["", ""]
    about = {"model_path": "other" if change == "settings" else "m", "prompt": dict.fromkeys(PROMPT_KINDS, pair)}
    export_visual_tokens.export(model, questions, prepare, folder, about, size, str(images))


def served(folder: Path) -> list[Any]:
    """Everything that dyvte reads of an export."""
    read = ExportedDataset(str(folder))
    tokens = [read.export.tokens(index)[0] for index in range(len(read))]
    lines = [{key: line[key] for key in line if key not in ("file", "number", "embeddings")} for line in read.lines]
    about = {key: value for key, value in read.export.about.items() if key != "shards"}
    return [about, lines, [(each.input_ids.tolist(), each.embeddings.tolist()) for each in tokens]]


CHANGES = ["all weights", "projector.weight", "projector.bias", "table.weight", "settings", "image", "question"]
CHANGES += ["answer", "kind", "image_id", "fewer", "more", "shard size", "larger shards"]


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_over_another_is_that_of_an_empty_folder(change: str, tmp_path: Path) -> None:
    export_small(tmp_path / "same", tmp_path)
    before = served(tmp_path / "same")
    last = {"fewer": 1, "more": 5}.get(change, 3)
    with suppress(OSError):
        export_small(tmp_path / "same", tmp_path, change, fail_at=last)
        assert change == "fewer", "what is there already is not made again"
    if change != "fewer":
        assert served(tmp_path / "same") == before, "the earlier export stays whole until the other is finished"
    export_small(tmp_path / "same", tmp_path, change)
    export_small(tmp_path / "new", tmp_path, change)
    assert served(tmp_path / "same") == served(tmp_path / "new")
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / each / "shards").iterdir()} for each in ("same", "new")
    ]
    assert files[0] == files[1], "nothing is left of the earlier one"


def test_an_older_export_is_read_and_replaced(tmp_path: Path) -> None:
    export_small(tmp_path / "e", tmp_path)
    expected = served(tmp_path / "e")
    about = json.loads((tmp_path / "e" / "export.json").read_text())
    for number, name in enumerate(about.pop("shards")):
        for file in (tmp_path / "e" / "shards").glob(f"{name}*"):
            file.rename(file.with_name(f"{number:05d}{file.suffix}"))
    (tmp_path / "e" / "export.json").write_text(json.dumps(about))
    assert served(tmp_path / "e") == expected
    export_small(tmp_path / "e", tmp_path, "all weights")
    assert not list((tmp_path / "e" / "shards").glob("00000.*"))
    assert served(tmp_path / "e") != expected
