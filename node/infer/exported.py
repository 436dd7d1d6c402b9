"""Networks from files: TorchScript and torch.export archives, without anything in them that Python would execute.

A torch.export archive (.pt2) is a zip of a graph in JSON, raw weights and, for whoever exported it, sample inputs in a
pickle. torch reads that pickle, and pickled weights and constants, with code execution allowed, resolves the graph's
operators by attribute access from `torch`, and evaluates its symbolic sizes. So an archive is read only when none of
these holds more than tensors, operators and arithmetic.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from node.errors import ModelError
from node.infer.failures import explained

_OPERATOR = re.compile(
    r"(torch\.ops\.[a-z0-9_]+\.\w+(\.\w+)?|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\.sym_\w+)", re.ASCII
)
# What sizes and guards are written with: sympy's srepr of sums, products and comparisons over named symbols.
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +*/(),.<>=!&|~%-]*", re.ASCII)
_VOCABULARY = """
    Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality False FloatPow FloatTrueDiv FloorDiv FloorToInt Ge GreaterThan
    Gt Identity IntTrueDiv Integer Le LessThan Lt Max Min Mod ModularIndexing Mul Ne Not Or PowByNatural PythonMod Pow
    Rational StrictGreaterThan StrictLessThan Symbol ToFloat True TruncToFloat TruncToInt Unequality Where and ceiling
    floor int_oo integer negative nonnegative not oo or positive
"""
_NAMES = frozenset(_VOCABULARY.split())
_SYMBOL = re.compile(r"(s|u|zuf|zf)[0-9]+", re.ASCII)
_QUOTED_SYMBOL = re.compile(r"'((?:s|u|zuf|zf)[0-9]+)'", re.ASCII)
_INPUT_SIZE = re.compile(r"L\['[A-Za-z_]\w*'\]\.size\(\)\[[0-9]\]", re.ASCII)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_.]*", re.ASCII)
_PLAIN_FIELDS = ("name", "forward_arg_names", "parameter_name", "buffer_name", "tensor_constant_name", "fqn")


@dataclass(frozen=True)
class LoadedNetwork:
    """A network on its device, and the shape that it insists on."""

    run: Callable[[torch.Tensor], Any]
    shape: tuple[int | None, ...] | None  # of its input, batch and channels first; None: any


def load_torchscript(name: str, path: Path, device: str) -> LoadedNetwork:
    """A TorchScript archive; `ModelError` where it is none. Its pickles are read by torch's C++, which runs nothing."""
    with explained(name, f"read {path.name} as TorchScript"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export, and reads TorchScript still
        network = torch.jit.load(str(path), map_location=torch.device(device))
        return LoadedNetwork(network.eval(), None)


def load_exported(name: str, path: Path, device: str) -> LoadedNetwork:
    """A torch.export archive of one network; `ModelError` where it is none or holds what Python would execute."""
    try:
        from torch.export.passes import move_to_device_pass
        from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2
    except ImportError:
        raise ModelError(
            f"model {name}: torch {torch.__version__} reads no .pt2 archives; install torch 2.8 or newer"
        ) from None
    with explained(name, f"read {path.name} as a torch.export archive"):
        # Read once, so that what is checked is what is loaded; and by load_pt2, as torch.export.load turns to an older
        # format, all pickles, where this one fails.
        archive = io.BytesIO(path.read_bytes())
        with PT2ArchiveReader(archive) as reader:
            _check_archive(name, reader)
        archive.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = load_pt2(archive).exported_programs["model"]
        if device != "cpu" or any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
            program = move_to_device_pass(program, device)
        inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), torch.Tensor):
            raise ModelError(f"model {name}: {path.name} takes {len(inputs)} inputs; expected one image")
        # A size that may vary is symbolic; no window of ours is so small that its least value matters.
        shape = tuple(size if isinstance(size, int) else None for size in inputs[0].meta["val"].shape)
        return LoadedNetwork(program.module(), shape)


def _check_archive(name: str, reader: Any) -> None:
    """Refuse everything in a .pt2 archive that torch would execute while it reads it."""
    files = reader.get_file_names()
    if "models/model.json" not in files or len([file for file in files if file.startswith("models/")]) != 1:
        raise ModelError(f"model {name}: expected a .pt2 archive with one network (models/model.json)")
    if any(file.startswith("data/aotinductor/") for file in files):
        raise ModelError(f"model {name}: the .pt2 archive holds compiled code; export it with torch.export.save")
    for file in files:
        if file.endswith("_config.json"):
            for weight in json.loads(reader.read_string(file))["config"].values():
                if weight["use_pickle"]:
                    raise ModelError(f"model {name}: {file} in the .pt2 archive holds pickled tensors; export it anew")
        elif file.startswith("data/sample_inputs/"):
            samples = reader.read_bytes(file)
            try:
                if samples:
                    torch.load(io.BytesIO(samples), weights_only=True)
            except Exception:  # torch would go on to read it with code execution allowed
                raise ModelError(
                    f"model {name}: {file} in the .pt2 archive holds more than tensors; export it anew"
                ) from None
    graph = json.loads(reader.read_string("models/model.json"))
    for key, text in _texts(graph):
        if key == "target" and not _OPERATOR.fullmatch(text):
            raise ModelError(f"model {name}: the .pt2 archive calls {text[:80]!r}, which is no operator of torch")
        if key in ("expr_str", "guards_code") and not _is_arithmetic(text):
            raise ModelError(f"model {name}: the .pt2 archive computes a size by {text[:80]!r}, which is no arithmetic")
        if key in _PLAIN_FIELDS and not _PLAIN.fullmatch(text):  # these become Python source when the graph is compiled
            raise ModelError(f"model {name}: the .pt2 archive holds the name {text[:80]!r}, which is no identifier")


def _texts(tree: Any, under: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the tree with the name of the field that it stands in."""
    if isinstance(tree, str):
        yield under, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, under)


def _is_arithmetic(text: str) -> bool:
    text = _QUOTED_SYMBOL.sub(r"\1", _INPUT_SIZE.sub("s0", text))
    known = all(word in _NAMES or _SYMBOL.fullmatch(word) is not None for word in _WORD.findall(text))
    return known and _EXPRESSION.fullmatch(text) is not None
