"""Answers of an exported early-exit network, with NumPy and ONNX Runtime alone. The policy is in the graphs.

from host import EarlyExits
answer = EarlyExits("folder")(images)    # arrays, rows first, as the network takes them
answer["label"], answer["exit"], answer["probabilities"], answer["confidence"], answer["confusion"]
answer["alarm"], where it was exported with one: how probably the answer is wrong
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class EarlyExits:
    """The network in ``folder``. Raises ``ValueError`` for files other than those that the manifest names."""

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        manifest = Path(folder) / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{folder} holds no manifest.json: it is not an exported network.")
        try:
            self.manifest: dict[str, Any] = dict(json.loads(manifest.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise ValueError(f"{manifest} is damaged: export the network again.") from None
        if self.manifest.get("format") != 1:
            raise ValueError(f"{manifest} has the format {self.manifest.get('format')!r}; this loop reads format 1.")
        if self.manifest.get("kind") != "folder":
            raise ValueError(f"{folder} is an export of kind {self.manifest.get('kind')!r}; this loop runs 'folder'.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = []
        for step in self.manifest["steps"]:
            file = Path(folder) / step["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing: the export is incomplete.")
            model = file.read_bytes()
            if hashlib.sha256(model).hexdigest() != step["sha256"]:
                raise ValueError(f"{file} is not the file that was exported: its hash has changed.")
            self.sessions.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))

    def __call__(self, *inputs: Any) -> dict[str, Any]:
        """Arrays with a row for each of the inputs, which come in the order of the manifest."""
        about, rows = self.manifest, self._checked(inputs)
        batch = len(inputs[0])
        rows |= {name: np.repeat(np.array(row["row"], row["dtype"]), batch, 0) for name, row in about["fresh"].items()}
        where, answer = np.arange(batch), {"probabilities": np.zeros((batch, about["num_classes"]))}
        names = ("confidence", "confusion", "cost", *["alarm"] * (about["alarm"] is not None))
        answer |= {name: np.zeros(batch) for name in names}
        answer |= {name: np.zeros(batch, np.int64) for name in ("label", "exit")} | {"valid": np.zeros(batch, bool)}
        for place, (step, session) in enumerate(zip(about["steps"], self.sessions, strict=True)):
            if not len(where):
                break
            found = session.run(None, {name: rows[name] for name in step["takes"]})
            rows |= dict(zip(step["gives"], found, strict=True))
            finite = np.isfinite(rows[f"logits.{place}"]).all(1)
            stop = rows.pop("stop", np.ones(len(where), bool))
            if place + 1 < len(self.sessions):  # a stop counts where logits are numbers; else the end does
                stop = stop | ~finite if step["exit"] == about["full_exit"] else stop & finite
            said = rows.get(f"answer.softmax.{place}", rows[f"softmax.{place}"])[stop]
            out = where[stop]
            answer["probabilities"][out], answer["confidence"][out] = said, said.max(1)
            answer["exit"][out], answer["cost"][out] = step["exit"], step["cost"]
            logits = rows.get(f"answer.logits.{place}", rows[f"logits.{place}"])[stop]
            answer["label"][out], answer["valid"][out] = logits.argmax(1), np.isfinite(logits).all(1)
            apart = [np.abs(rows[f"softmax.{k}"][stop] - said).sum(1) for k in range(place + 1)]
            answer["confusion"][out] = (np.sum(np.nan_to_num(apart, nan=2.0), 0) - step["mean"]) * step["scale"]
            if step["alarm"] is not None:
                passed = [rows[f"softmax.{k}"][stop] for k in range(place + 1)]
                answer["alarm"][out] = _wrong(said, passed, **step["alarm"])
            where = where[~stop]
            rows = {name: x if name in about["rowless"] else x[~stop] for name, x in rows.items()}
        return answer

    def _checked(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        wanted = self.manifest["inputs"]
        if len(inputs) != len(wanted):
            raise ValueError(f"The network takes {[one['name'] for one in wanted]}, found {len(inputs)} arrays.")
        for x, one in zip(inputs, wanted, strict=True):
            shape, dtype = [*getattr(x, "shape", ())], str(getattr(x, "dtype", type(x).__name__))
            if not shape or shape != [len(inputs[0]), *one["shape"]] or dtype != one["dtype"]:
                axes = ", ".join(["rows" if one is wanted[0] else str(len(inputs[0])), *map(str, one["shape"])])
                raise ValueError(f"Input {one['name']!r} is {one['dtype']} [{axes}], found {dtype} {shape}.")
        return {f"input.{one['name']}": x for x, one in zip(inputs, wanted, strict=True)}


def _wrong(said: Any, passed: Any, bias: float, weights: Any, least: float) -> Any:
    """How probably answers with the softmax ``said`` are wrong, given those of the exits passed."""
    row, label = np.arange(len(said)), said.argmax(1)
    own = np.nan_to_num([softmax[row, label] for softmax in passed])
    odds = np.log(np.maximum(own, least)) - np.log(np.maximum(1 - own, least))
    alarm = (1 + np.tanh((bias + np.array(weights) @ odds) / 2)) / 2
    return np.where(np.isnan(said).any(1), 1.0, alarm)
