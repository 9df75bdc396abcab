"""The networks of a pipeline from their files: each complete, in safetensors and of one variant, or refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from progrpo.messages import named
from progrpo.policies.hub import UnfitError

T = TypeVar("T", bound=nn.Module)
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_PART_OF = r"(-\d+-of-\d+)?"
_WEIGHTS = re.compile(rf"[\w-]+?{_PART_OF}(\.(?P<variant>[A-Za-z]\w*)){{0,1}}{_PART_OF}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def fetch(source: str, revision: str, variant: str, omitted: Collection[str]) -> Path:
    """The folder of a pipeline: `source` itself, or a hub id's snapshot without the `omitted` components."""
    if Path(source).is_dir():
        return Path(source)
    options = {"revision": revision or None, "variant": variant or None, "use_safetensors": True}
    try:
        return Path(DiffusionPipeline.download(source, **options, **dict.fromkeys(omitted)))
    except OSError as error:
        if "Could not find the necessary" not in str(error):
            raise
        which = f"of the variant {variant}" if variant else "without a variant; model.variant names one, such as fp16"
        raise UnfitError(f"it has no weights in safetensors {which}. {_PICKLED}") from error


def load_networks(
    folder: Path, index: Mapping[str, object], dtypes: Mapping[str, torch.dtype], variant: str
) -> dict[str, nn.Module]:
    """The networks that a pipeline's index names, each in its dtype of `dtypes` or in `default`.

    ValueError for one whose files are no safetensors, are of another variant, or lack what its configuration asks for.
    """
    kinds = {name: kind for name, entry in index.items() if (kind := network_class(entry)) is not None}
    available = {name: _variants(folder / name) for name in kinds}
    if variant and not any(variant in variants for variants in available.values()):
        others = ", ".join(sorted(set().union(*available.values()) - {""})) or "none"
        raise UnfitError(
            f"it has no weights of the variant {named(variant)}, of others {others}; leave model.variant empty, or name"
            " one that it has"
        )
    chosen = {name: variant if variant in available[name] else "" for name in kinds}
    for name in kinds:
        _require_weights(folder / name, available[name], chosen[name])
    return {
        name: load_network(kind, folder / name, dtype=dtypes.get(name, dtypes["default"]), variant=chosen[name] or None)
        for name, kind in kinds.items()
    }


def load_network(kind: type[T], source: str | Path, **options: object) -> T:
    """Call `kind.from_pretrained` on safetensors. ValueError where files do not fill the network of config.json.

    What is missing would be random numbers, or none at all. The loaders report it: names change on the way from a file
    to a network, so that names in files do not tell.
    """
    if not issubclass(kind, ModelMixin):  # transformers says in its log alone what has another size
        options["ignore_mismatched_sizes"] = True
    loader: Any = kind
    network, report = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    lacking = {name for name in report["missing_keys"] if not name.endswith("num_batches_tracked")}
    lacking |= {name for name, *_ in report["mismatched_keys"]}
    if lacking:
        raise UnfitError(
            f"{named(source)} lacks {len(lacking):,} of the {len(network.state_dict()):,} tensors that its config.json"
            f" asks for, such as {named(min(lacking))}{_others(report['unexpected_keys'])}"
        )
    return cast(T, network)


def network_class(entry: object) -> type[nn.Module] | None:
    """The class of an index's [library, class], if it is a network's."""
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES):
        return None
    kind = getattr(_LIBRARIES[entry[0]], str(entry[1]), None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def _variants(folder: Path) -> set[str]:
    """The variants of the weights in a folder; the empty text for weights without one."""
    matches = (_WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors"))
    return {match["variant"] or "" for match in matches if match}


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
    """A clause about what a file holds in the place of what is missing, as far as that says why."""
    wrapped = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in unexpected)), None)
    if wrapped:
        return (
            f"; its names begin with {wrapped}, as those of a network that was saved inside DistributedDataParallel or"
            f" torch.compile: save the network itself, or take {wrapped} off its names"
        )
    return f"; it has {named(min(unexpected))}, which has no place in it" if unexpected else ""
