"""What a PEFT adapter makes of a base model's weights, one layer at a time and without the model.

PEFT is given a model whose large weights are a single zero, repeated; a layer gets its numbers from the files when its
turn comes, PEFT merges it in float32 as it would merge the whole model, and the numbers go again. So the memory that is
taken is that of the adapter and of one layer, and the merged weights are the same bits as of a model merged as a whole.

Right or refused here too: of each layer the merged weight must give what base and adapter give together. Whatever is
not a linear layer or an embedding with an adapter, or a module that was trained whole, is left to
:func:`redraft.loading.adapters.merge`; so are tables that head and embedding share, and vocabularies that were grown.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import UserError
from redraft.loading.adapters import Adapter
from redraft.loading.stored import Weight, read
from redraft.pieces import PIECE

# Numbers of a weight that is simply read: biases and norms, which some adapters bring along whole.
SMALL = 2**16
# Inputs that a layer is tried with, and of the output's norm what rounding may put between two orders of the same sums.
TRIED, ROUNDING, CHANGE = 8, 1e-4, 1e-2


class NotByLayer(Exception):
    """This adapter is not merged a layer at a time."""


@dataclass
class Changes:
    """The weights that an adapter changes, by the names of the base model's state."""

    adapter: str
    weights: Mapping[str, Weight]
    layers: dict[str, Any] = field(default_factory=dict)  # PEFT's layer by the name of the base's
    whole: dict[str, Tensor] = field(default_factory=dict)
    moved: bool = False

    def names(self) -> list[str]:
        """The names of the changed weights."""
        return [f"{name}.weight" for name in self.layers] + list(self.whole)

    def notes(self) -> list[str]:
        """What there is to say once all are merged."""
        text = f"the adapter {self.adapter} changes no logit: its change of every weight that was tried is nothing"
        return [] if self.moved else [text]

    def merged(self, name: str) -> Tensor:
        """A changed weight in float32. Raises ``NotByLayer`` where merging would give another layer."""
        if name in self.whole:
            self.moved = True
            return self.whole[name].float()
        layer = self.layers[name.removesuffix(".weight")]
        base, hollow = layer.get_base_layer(), layer.get_base_layer().weight
        base.weight = nn.Parameter(read(self.weights[name], torch.float32), requires_grad=False)
        try:
            return self._merged(layer, base)
        finally:
            layer.merged_adapters.clear()
            base.weight = hollow

    @torch.no_grad()
    def _merged(self, layer: Any, base: Any) -> Tensor:
        inputs, bias = _inputs(base), None if getattr(base, "bias", None) is None else base.bias.clone()
        try:
            plain, expected = base(inputs), layer(inputs)
            layer.merge()
        except Exception as error:  # whatever PEFT raises: the whole merge says it in words
            raise NotByLayer from error
        got, away = base(inputs), base.weight.detach()
        # A change far below the layer's own output is lost in its rounding, and what it is made of is compared then.
        apart, change = float((got - expected).norm()), float((expected - plain).norm())
        same_bias = bias is None or torch.equal(bias, base.bias)
        if not apart <= max(ROUNDING * float(expected.norm()), CHANGE * change) or not same_bias:
            raise NotByLayer
        self.moved = self.moved or change > 0
        return away


@dataclass(frozen=True)
class Changed:
    """A weight that an adapter changes (:class:`redraft.loading.stored.Weight`)."""

    base: Weight
    changes: Changes
    name: str

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def samples(self, step: int) -> Tensor:
        return self.changes.merged(self.name).reshape(-1)[::step].clone()

    def pieces(self) -> Iterator[Tensor]:
        yield from self.changes.merged(self.name).reshape(-1).split(PIECE)


def _inputs(base: Any) -> Tensor:
    """Inputs to try a layer with: a few vectors, or ids from all of a table."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (1, 16 * TRIED), generator=generator)
    return torch.randn(1, TRIED, base.in_features, generator=generator)


def hollow(model: Any, weights: Mapping[str, Weight]) -> tuple[Any, dict[str, Tensor]]:
    """A copy of a model without numbers, in which small weights are read and each large one is a zero, repeated; and
    the small ones by name as they were read."""
    copied, known, small = copy.deepcopy(model), dict[int, nn.Parameter](), dict[str, Tensor]()
    for place, module in copied.named_modules():
        for key, old in list(module._parameters.items()):
            if old is None:
                continue
            name = f"{place}.{key}" if place else key
            if id(old) not in known:
                new = torch.zeros(1).expand(old.shape)
                if old.numel() <= SMALL:
                    new = read(weights[name], torch.float32)
                    small[name] = new.clone()
                known[id(old)] = nn.Parameter(new, requires_grad=False)
            module._parameters[key] = known[id(old)]
    return copied, small


def changes(model: Any, weights: Mapping[str, Weight], adapter: Adapter) -> Changes:
    """What ``adapter`` changes of the plain ``model``, which holds no numbers, and its ``weights``.

    Raises ``NotByLayer``.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if adapter.grown(model):
        raise NotByLayer
    copied, small = hollow(model, weights)
    names = {id(module): name for name, module in copied.named_modules()}
    own = dict(copied.named_parameters())
    tables = [copied.get_input_embeddings(), copied.get_output_embeddings()]
    shared = tables[1] is not None and tables[0].weight is tables[1].weight
    try:
        joined = adapter.join(copied).eval()
    except UserError as error:  # the whole merge says it, unless it is for want of numbers
        raise NotByLayer from error
    found = Changes(adapter.name, weights)
    inside = list[str]()
    for place, module in joined.named_modules():
        if any(place.startswith(f"{one}.") for one in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            if id(base) not in names or not (isinstance(base, nn.Linear) or type(base) is nn.Embedding):
                raise NotByLayer
            found.layers[names[id(base)]] = module
            inside.append(place)
        elif isinstance(module, ModulesToSaveWrapper):
            name = names[id(module.original_module)]
            saved = module.modules_to_save[module.active_adapters[0]].state_dict()
            found.whole |= {f"{name}.{key}": tensor for key, tensor in saved.items()}
            inside.append(place)
        elif type(module).__name__.endswith("Wrapper") and "peft" in type(module).__module__:
            raise NotByLayer
    # Biases and norms that the adapter's file has whole.
    found.whole |= {
        name: own[name].detach() for name, old in small.items() if name in own and not torch.equal(own[name], old)
    }
    ends = {names[id(table)] for table in tables if table is not None}
    if shared and any(name.rpartition(".")[0] in ends for name in found.names()):
        raise NotByLayer
    if not set(found.names()) <= weights.keys():
        raise NotByLayer
    return found
