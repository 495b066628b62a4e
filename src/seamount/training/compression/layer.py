"""Quantizes one decoder layer: runs it over the calibration activations, scales, clips, rounds, writes.

Called by `compress` for each layer in turn. Attention, norms, dense feed-forward networks and shared
experts are held as the network's own modules in fp32; routed experts are read one by one, so that a layer of hundreds
needs the memory of one. What the next layer sees is what the unrounded layer makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seamount.models.batch import Batch
from seamount.models.keymap import layer_experts, layer_placements
from seamount.models.layers import Angles, MixtureOfExperts
from seamount.models.network import DecoderLayer, MtpBlock
from seamount.models.rotary import Rotary

from .experts import Choice, Probe, Routed, RoutedExperts
from .files import TORCH_DTYPES, Activations, ShardWriter
from .groups import Group, Weights, attention_groups, down_group, input_group, join_group
from .plan import CHUNK_TOKENS, Format, Method, Source
from .rounder import Rounder
from .search import InputStatistics


@dataclass(frozen=True)
class Chunk:
    """Whole sequences that go through a layer at once: `rows` of the activations, and where each begins in them."""

    rows: slice
    starts: tuple[int, ...]

    def batch(self) -> Batch:
        """Their batch; a layer alone looks up no tokens."""
        positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(self.starts)])
        return Batch(torch.empty(0, dtype=torch.int64), positions, self.starts)


def chunks(lengths: list[int]) -> list[Chunk]:
    """Cut sequences of these lengths, which lie one after the other, into chunks."""
    found, first, starts = [], 0, [0]
    for length in lengths:
        if starts[-1] and starts[-1] + length > CHUNK_TOKENS:
            found.append(Chunk(slice(first, first + starts[-1]), tuple(starts)))
            first, starts = first + starts[-1], [0]
        starts.append(starts[-1] + length)
    return [*found, Chunk(slice(first, first + starts[-1]), tuple(starts))]


# Rows of a chunk, as a block of multi-token prediction needs them: next tokens' embeddings, and hidden states.
Joined = Callable[[slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Flow:
    """The activations that a layer works on.

    Attributes:
        lengths: of the sequences.
        entering: what enters the decoder layer; a block of multi-token prediction makes it of `joined` first.
        middle: room for what lies between attention and experts.
        leaving: room for what leaves the layer.
    """

    lengths: list[int]
    entering: Activations
    middle: Activations
    leaving: Activations
    joined: Joined | None = None


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer.

    Attributes:
        relative_error: root of the squared error of what leaves it, over that of what it adds to what enters it; None
            without calibration. Of the first chunk of tokens, and of rounded weights: activations stay in fp32.
        num_plain_experts: experts that saw too few tokens to be searched for, so were rounded to nearest.
    """

    relative_error: float | None
    num_plain_experts: int


class LayerQuantizer:
    """Quantizes layer `index` of `source` into `writer`; see `Rounder` for the rest."""

    def __init__(
        self, source: Source, index: int, form: Format, method: Method, writer: ShardWriter, tell: Callable[[int], None]
    ) -> None:
        self._source, self._index, config = source, index, source.config
        prefix = f"model.layers.{index}."
        self._places = {place.key.removeprefix(prefix): place for place in layer_placements(config, index)}
        self._experts_config = layer_experts(config, index)
        self._block, self._layer, self._weights = self._build()
        norm_dtype = TORCH_DTYPES[source.kept_dtype(self._places["input_layernorm.weight"])]
        self._rounder = Rounder(form, method, writer, norm_dtype, tell)
        self._rotary = Rotary(config.rope, config.latent.qk_rope_head_dim if config.latent else config.head_dim)
        self._statistics: dict[str, InputStatistics] = {}

    @torch.inference_mode()
    def run(self, flow: Flow | None) -> LayerResult:
        """Do it; without `flow`, weights are rounded to nearest and nothing is measured."""
        norm = self._layer.post_attention_layernorm
        norm_before = (norm.weight.clone(), norm.eps)
        choice = None if flow is None else self._observe(flow)
        experts = None
        if self._experts_config is not None:
            routed = None if flow is None or choice is None else Routed(choice, flow.middle, flow.leaving)
            experts = RoutedExperts(self._source, self._index, self._experts_config, self._rounder, norm_before, routed)
        input_scales = self.scale(experts) if self._rounder.method == "awq" else None
        self._round()
        if flow is None:
            if experts is not None:
                experts.finish(None, None)
            return LayerResult(None, 0)
        before, after, probe = self._probe(flow)
        if experts is not None:
            experts.finish(input_scales, probe)
        exact = flow.leaving.read(chunks(flow.lengths)[0].rows)
        error = (after - exact).norm() / (exact - before).norm().clamp(min=1e-30)
        return LayerResult(float(error), 0 if experts is None else experts.num_plain)

    def scale(self, experts: RoutedExperts | None) -> Tensor:
        """Fold in the best scales, which changes the function of no layer; returns those of the experts' inputs."""
        for group in self._groups()[:-2]:
            self._scale(group)
        incoming, down = self._groups()[-2:]
        found = self._rounder.scale(
            incoming,
            self._weights,
            self._places,
            self._statistics[incoming.module],
            None if experts is None else experts.input_errors,
        )
        if down.module in self._statistics:
            self._scale(down)
        return found.of_input

    def _groups(self) -> list[Group]:
        """The groups of the layer without routed experts; the last two are those of the feed-forward network."""
        config = self._source.config
        has_experts = self._experts_config is not None
        prefix = "mlp.shared_experts." if has_experts else "mlp."
        place = self._places.get(f"{prefix}down_proj.weight")
        found = [] if self._block is None else [join_group()]
        found += attention_groups(config)
        return [*found, input_group(has_experts=has_experts), down_group(prefix, place.shape[1] if place else 0)]

    def _scale(self, group: Group) -> None:
        self._rounder.scale(group, self._weights, self._places, self._statistics[group.module])

    def _round(self) -> None:
        """Round and write every tensor of the layer but the routed experts."""
        modules = {f"{name}.weight": group.module for group in self._groups() for name in group.linears}
        for name, place in self._places.items():
            if self._rounder.form.rounds(place):
                self._rounder.round(place, self._weights[name], self._statistics.get(modules[name]))
            else:
                self._rounder.writer.write(place.key, self._weights[name])
        self._statistics.clear()

    def _observe(self, flow: Flow) -> Choice | None:
        """Send all tokens through the unrounded layer; of the routed experts' part only the choice is made."""
        hooks = self._watch(sum(flow.lengths)) if self._rounder.method == "awq" else []
        choices = []
        for chunk in chunks(flow.lengths):
            x = self._entering(flow, chunk)
            if flow.joined is not None:
                flow.entering.write(chunk.rows, x)
            middle, _, choice, leaving = self._forward(x, chunk)
            if choice is not None:
                flow.middle.write(chunk.rows, middle)
                choices.append(choice)
            flow.leaving.write(chunk.rows, leaving)
        for hook in hooks:
            hook.remove()
        if not choices:
            return None
        return Choice(torch.cat([c.weights for c in choices]), torch.cat([c.ids for c in choices]))

    def _probe(self, flow: Flow) -> tuple[Tensor, Tensor, Probe | None]:
        """What enters and leaves the rounded layer in the first chunk; routed experts are still to be added."""
        chunk = chunks(flow.lengths)[0]
        before = flow.entering.read(chunk.rows)
        _, normed, choice, after = self._forward(self._entering(flow, chunk), chunk)
        probe = None if choice is None or normed is None else Probe(choice, normed, after)
        return before, after, probe

    def _entering(self, flow: Flow, chunk: Chunk) -> Tensor:
        if flow.joined is None or self._block is None:
            return flow.entering.read(chunk.rows)
        embeddings, hidden = flow.joined(chunk.rows)
        joined = torch.cat((self._block.enorm(embeddings), self._block.hnorm(hidden)), dim=-1)
        return self._block.eh_proj(joined)

    def _forward(self, x: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None, Choice | None, Tensor]:
        """What leaves attention, its norm, the router's choice, and what leaves the layer but for routed experts."""
        layer, batch = self._layer, chunk.batch()
        angles: Angles = self._rotary.angles(batch.positions)
        middle = layer.self_attn(x, layer.input_layernorm, angles, batch, None)
        if not isinstance(layer.mlp, MixtureOfExperts):
            return middle, None, None, layer.mlp(middle, norm=layer.post_attention_layernorm, add_to=middle)
        normed = layer.post_attention_layernorm(middle)
        choice = Choice(*layer.mlp.gate(normed))
        shared = layer.mlp.shared_experts
        return middle, normed, choice, middle.clone() if shared is None else shared(normed, add_to=middle)

    def _watch(self, num_tokens: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Let statistics see the inputs of every group."""
        root = self._layer if self._block is None else self._block
        modules = dict(self._layer.named_modules()) | dict(root.named_modules())
        hooks = []
        for group in self._groups():
            module = modules.get(group.module)
            if module is not None:
                width = module.in_features if isinstance(module, nn.Linear) else self._source.config.hidden_size
                statistics = self._statistics[group.module] = InputStatistics(width, num_tokens)
                hooks.append(module.register_forward_pre_hook(_Watch(statistics), with_kwargs=True))
        return hooks

    def _build(self) -> tuple[MtpBlock | None, DecoderLayer, Weights]:
        """The layer's module with its weights in fp32, but for routed experts; and views of them by checkpoint name."""
        config, index = self._source.config, self._index
        with torch.device("meta"):
            is_block = index >= config.num_layers
            root: nn.Module = MtpBlock(config, index) if is_block else DecoderLayer(config, index)
        prefix = f"mtp.{index - config.num_layers}." if is_block else f"layers.{index}."
        held: Weights = {}
        weights: Weights = {}
        for name, place in self._places.items():
            parameter = place.parameter.removeprefix(prefix)
            if parameter not in held:
                held[parameter] = _materialise(root, parameter)
            weights[name] = place.part_of(held[parameter])
            weights[name].copy_(self._source.read(place))
        if isinstance(root, MtpBlock):
            return root, root.layer, weights
        return None, root, weights  # type: ignore[return-value]


class _Watch:
    """A hook that shows a module's input to statistics: behind the norm that is part of its call."""

    def __init__(self, statistics: InputStatistics) -> None:
        self._statistics = statistics

    def __call__(self, module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> None:
        (x,) = args
        norm = kwargs.get("norm")
        self._statistics.add(norm(x) if isinstance(norm, nn.Module) else x)


def _materialise(root: nn.Module, name: str) -> Tensor:
    """Give a parameter or buffer of a module on the meta device its memory, in fp32."""
    owner_name, _, leaf = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    old = getattr(owner, leaf)
    values = torch.empty(old.shape)
    setattr(owner, leaf, nn.Parameter(values, requires_grad=False) if isinstance(old, nn.Parameter) else values)
    return values
