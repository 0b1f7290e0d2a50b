"""A model named on the command line -> nn.Module: the user's own function, a timm name or a Hugging Face folder.

It refuses to know what a model is for, to download anything and to unpickle objects.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from shallowdeep.files import FormatError, read_json, read_tensors
from shallowdeep.types import MissingExtra

HEADS = ("ForSequenceClassification", "ForImageClassification")
# What makes transformers run code from elsewhere: a repository's own Python, or a compiled kernel.
CODE = {"auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}


def load_model(source: str, *, weights: Path | None = None, num_classes: int | None = None) -> nn.Module:
    """The network that ``source`` names, in eval mode, with ``weights`` loaded into it when given.

    - ``module:callable`` **runs your code**: the module is imported, the working directory first, and the callable
      called, with ``num_classes=`` when it takes that. Its own errors come through unchanged.
    - ``timm:NAME`` is a timm architecture with random weights.
    - ``hf:FOLDER`` is a local transformers folder, ``config.json`` and ``*.safetensors``: a sequence or an image
      classifier with one label per row. Code in it is never run.

    Raises ``ValueError`` or ``TypeError`` for a name or weights that do not fit, ``FormatError`` for damaged files
    and ``MissingExtra`` when timm or transformers cannot be used.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    kind, _, name = source.partition(":")
    if not kind or not name:
        perhaps = f"hf:{source}" if os.path.isdir(source) else f"timm:{source}"
        ways = "'module:callable', 'timm:NAME' or 'hf:FOLDER'"
        raise ValueError(f"A model is {ways}, found {source!r}. Perhaps {perhaps!r}?")
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, found {num_classes}.")
    if kind == "timm":
        model = _from_timm(name, num_classes)
    elif kind == "hf":
        model = _from_hugging_face(Path(name), num_classes)
    else:
        model = _from_code(kind, name, num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the state dict in ``path`` into ``model``: all of it, or nothing where a key or a shape does not fit.

    ``.safetensors``, or a torch file of plain tensors, possibly under the key ``state_dict``, possibly with
    ``module.`` (DataParallel's) before every key. Raises ``ValueError`` for what does not fit and ``FormatError``
    for a file that is damaged or needs objects unpickled.
    """
    state = read_tensors(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    wanted = model.state_dict()
    if _all_prefixed(state) and not _all_prefixed(wanted):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    problems = {
        # Files from before torch 0.4.1 lack this counter of batch normalisation, and torch itself fills it in.
        "missing": [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {list(tensor.shape)} for {list(wanted[name].shape)}"
            for name, tensor in state.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        found = ", ".join(f"{len(names)} {problem} ({_few(names)})" for problem, names in problems.items() if names)
        raise ValueError(f"{path} does not fit {type(model).__name__}: {found}.")
    model.load_state_dict(state)


def _read_torch(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"No file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes raise whatever they run into, and torch's own refusals are a page long.
    except Exception as error:
        why = f"{path} is damaged or holds objects, which are never unpickled ({type(error).__name__})"
        raise FormatError(f"{why}; save tensors: torch.save(model.state_dict(), path).") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds {type(content).__name__}, not a state dict.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FormatError(f"{path} is not a state dict: {name!r} is {type(value).__name__}, not a tensor.")
    return dict(content)


def _from_code(module_name: str, path: str, num_classes: int | None) -> nn.Module:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"{module_name!r} does not name a module; write package.module, without slashes and .py.")
    before, here = list(sys.path), os.getcwd()
    if here not in sys.path:
        # As `python -m` does; it stays, since worker processes find the model's classes by it.
        sys.path.insert(0, here)
    try:
        factory = _find(module_name, path)
        # A network written for one data set knows its classes and takes no number of them.
        asked = num_classes is not None and _takes_num_classes(factory)
        model = factory(num_classes=num_classes) if asked else factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{module_name}:{path} returned {type(model).__name__}, an nn.Module is needed.")
    except BaseException:
        sys.path[:] = before
        raise
    return model


def _find(module_name: str, path: str) -> Callable[..., object]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists may miss one of its own: that error is the user's to see.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"No module {module_name!r} in {os.getcwd()} or on the Python path.") from None
    try:
        found = operator.attrgetter(path)(module)
    except AttributeError:
        offered = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"No {path!r} in module {module_name!r}. {_nearest(path, offered)}") from None
    if isinstance(found, nn.Module) or not callable(found):
        raise TypeError(f"{module_name}:{path} is {type(found).__name__}; name what is called to make an nn.Module.")
    return cast(Callable[..., object], found)


def _takes_num_classes(factory: Callable[..., object]) -> bool:
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _from_timm(name: str, num_classes: int | None) -> nn.Module:
    try:
        import timm
    # A torchvision made for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise _missing(f"timm:{name}", "timm", error) from None
    names = [*timm.list_models(), *timm.list_pretrained()]
    # This also keeps out 'hf-hub:' and 'local-dir:', which timm would follow.
    if name not in names:
        raise ValueError(f"No model {name!r} in timm {timm.__version__}. {_nearest(name, names)}")
    return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _from_hugging_face(folder: Path, num_classes: int | None) -> nn.Module:
    head = _head_of(folder)
    try:
        import transformers

        model, report = getattr(transformers, f"AutoModel{head}").from_pretrained(
            str(folder.resolve()),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise _missing(f"hf:{folder}", "transformers", error) from None
    # transformers meets whatever the files hold, and has another error for each.
    except Exception as error:
        raise FormatError(f"{folder} cannot be loaded, its files are damaged or do not fit: {_line(error)}.") from None
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])
        raise ValueError(f"{folder} has no weights for {len(lost)} of the model's tensors ({_few(lost)}).")
    found = model.config.num_labels
    if found < 2 or (num_classes or found) != found:
        raise ValueError(f"{folder} has {found} classes, {num_classes or '2 or more'} are needed.")
    return cast(nn.Module, model)


def _head_of(folder: Path) -> str:
    """Which of ``HEADS`` the folder's network has, once nothing in the folder speaks against loading it."""
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}; hf: takes a local one with config.json and *.safetensors.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'} holds {type(config).__name__}, not an object.")
    code = sorted(CODE & set(_keys(config)))
    if code:
        raise ValueError(
            f"{folder} asks for code of its own ({code[0]}), which is not run; write it as module:callable."
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter to another model; merge the two and save the result.")
    problem = config.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification":
        raise ValueError(
            f"{folder} is for {problem!r}; early exits need one class per row, single_label_classification."
        )
    if not any(folder.glob("*.safetensors")):
        found = _few(sorted(file.name for file in folder.iterdir()))
        raise ValueError(f"{folder} has no *.safetensors, the only weights read (pickled .bin never); found {found}.")
    architectures = config.get("architectures") or []
    heads = [head for head in HEADS if len(architectures) == 1 and str(architectures[0]).endswith(head)]
    if not heads:
        raise ValueError(f"{folder} is for {architectures}; one of *{' and *'.join(HEADS)} is needed.")
    return heads[0]


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(inner)


def _all_prefixed(names: Iterable[str]) -> bool:
    return all(name.startswith("module.") for name in names)


def _missing(model: str, library: str, error: BaseException) -> MissingExtra:
    needs = f"{library}, and torchvision if present to be made for this torch"
    return MissingExtra(f"{model} needs {needs} ({_line(error)}): pip install 'shallowdeep[zoo]'")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Nearest: {', '.join(near)}." if near else f"There are {_few(names)}."
