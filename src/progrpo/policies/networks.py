"""The networks of a pipeline from their files: each whole, in safetensors and of one variant, or not at all."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from progrpo.messages import named
from progrpo.policies.hub import UnfitError

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_PART_OF = r"(-\d+-of-\d+)?"
_WEIGHTS = re.compile(rf"[\w-]+?{_PART_OF}(\.(?P<variant>[A-Za-z]\w*)){{0,1}}{_PART_OF}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def fetch(source: str, revision: str, variant: str, without: Collection[str]) -> Path:
    """The folder of a pipeline: `source` itself, or the snapshot of a hub id, downloaded but for the components `without`."""
    if Path(source).is_dir():
        return Path(source)
    options = {"revision": revision or None, "variant": variant or None, "use_safetensors": True}
    try:
        return Path(DiffusionPipeline.download(source, **options, **dict.fromkeys(without)))
    except OSError as error:
        if "Could not find the necessary" not in str(error):
            raise
        which = f"of the variant {variant}" if variant else "without a variant; model.variant names one, such as fp16"
        raise UnfitError(f"it has no weights in safetensors {which}. {_PICKLED}") from error


def load_networks(
    folder: Path, index: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], variant: str
) -> dict[str, Any]:
    """The networks that a pipeline's index names, each in its dtype of `dtypes` or in `default`.

    ValueError for one whose files are no safetensors, are of another variant, or lack what its configuration asks for.
    """
    kinds = {name: kind for name, entry in index.items() if (kind := _network(entry)) is not None}
    held = {name: _variants(folder / name) for name in kinds}
    if variant and not any(variant in variants for variants in held.values()):
        others = ", ".join(sorted(set().union(*held.values()) - {""})) or "none"
        raise UnfitError(
            f"it has no weights of the variant {named(variant)}, of others {others}; leave model.variant empty, or name"
            " one that it has"
        )
    chosen = {name: variant if variant in held[name] else "" for name in kinds}
    for name in kinds:
        _require_weights(folder / name, held[name], chosen[name])
    return {
        name: load_whole(kind, folder / name, dtype=dtypes.get(name, dtypes["default"]), variant=chosen[name] or None)
        for name, kind in kinds.items()
    }


def load_whole(kind: Any, source: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained` from safetensors; ValueError where files do not fill the network that config.json describes.

    What they lack would be random numbers, or no numbers at all. The loaders are asked for it: names change on the way
    from a file to a network, so that neither names nor numbers in files tell.
    """
    if not issubclass(kind, ModelMixin):  # transformers says in its log alone what has another size
        options["ignore_mismatched_sizes"] = True
    network, report = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    lacking = {name for name in report["missing_keys"] if not name.endswith("num_batches_tracked")}
    lacking |= {name for name, *_ in report["mismatched_keys"]}
    if lacking:
        raise UnfitError(
            f"{named(source)} lacks {len(lacking):,} of the {len(network.state_dict()):,} tensors that its config.json"
            f" asks for, such as {named(min(lacking))}{_others(report['unexpected_keys'])}"
        )
    return network


def _network(entry: object) -> Any:
    """The class that an index's [library, class] names, if it is a network's."""
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES):
        return None
    kind = getattr(_LIBRARIES[entry[0]], str(entry[1]), None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def _variants(folder: Path) -> set[str]:
    """The variants of the weights in a folder; empty for those without one."""
    found = (_WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors"))
    return {match["variant"] or "" for match in found if match}


_PICKLED = (
    "Pickles (.bin, .pt, .ckpt) can run code and are never read; where you trust one, load it with diffusers, and its"
    " save_pretrained(FOLDER) writes safetensors"
)


def _require_weights(folder: Path, variants: Collection[str], variant: str) -> None:
    if variant in variants:
        return
    if variants:
        own = min(variants)
        raise UnfitError(
            f"{named(folder)} holds the variant {', '.join(sorted(variants))} of its weights alone; give model.variant"
            f" {own}, or --variant {own} of sample and eval"
        )
    if pickles := sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES):
        raise UnfitError(
            f"{named(folder)} holds its weights as {named(pickles[0])}, and not in safetensors. {_PICKLED}"
        )
    raise UnfitError(f"{named(folder)} holds no weights in safetensors; copy the whole folder")


def _others(unexpected: Collection[str]) -> str:
    """What a file holds in the place of what it lacks, as far as that says why."""
    wrapped = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in unexpected)), None)
    if wrapped:
        return (
            f"; its names begin with {wrapped}, as those of a network that was saved inside DistributedDataParallel or"
            f" torch.compile: save the network itself, or take {wrapped} off its names"
        )
    return f"; it has {named(min(unexpected))}, which has no place in it" if unexpected else ""
