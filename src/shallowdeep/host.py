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


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that ``manifest`` says but its own hash."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


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
        kind, version = self.manifest.get("kind"), self.manifest.get("format")
        if version != 3:
            raise ValueError(f"{manifest} has the format {version!r}; this loop reads format 3.")
        if kind not in ("folder", "file"):
            raise ValueError(f"{folder} is an export of kind {kind!r}; this loop runs 'folder' and 'file'.")
        if manifest_hash(self.manifest) != self.manifest.get("sha256"):
            raise ValueError(f"{manifest} is not what was exported: its hash has changed. Export the network again.")
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
        about, rows, batch = self.manifest, self._checked(inputs), len(inputs[0])
        rows |= {name: np.repeat(np.array(row["row"], row["dtype"]), batch, 0) for name, row in about["fresh"].items()}
        answer = {one["name"]: np.zeros((batch, *one["shape"]), one["dtype"]) for one in about["answers"]}
        where = np.arange(batch)
        for step, session in zip(about["steps"], self.sessions, strict=True):
            if not len(where):
                break
            found = session.run(None, {name: rows[name] for name in step["takes"]})
            rows |= dict(zip(step["gives"], found, strict=True))
            leave = rows.pop("leave", np.ones(len(where), bool))
            for name, array in answer.items():
                array[where[leave]] = rows.pop(name)[leave]
            where = where[~leave]
            rows = {name: x if name in about["rowless"] else x[~leave] for name, x in rows.items()}
        cost_E, said = np.array([one["cost"] for one in about["exits"]]), answer.get("logits", answer["probabilities"])
        return answer | {"cost": cost_E[answer["exit"]], "valid": np.isfinite(said).all(1)}

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
