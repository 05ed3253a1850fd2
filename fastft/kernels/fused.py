"""The CPU's fast layers: LoRA projections, gated MLP, RMSNorm, rotary attention and the loss, each
with its own backward.

What they save against autograd over peft and transformers, which they replace only inside
`FusedLayers.active()`:
- peft's LoRA weights are float32 over a bfloat16 base, so every projection casts its input forth
  and back. Here A and B are cast (they are small), inputs are read once by projections that share
  them, and the input's gradient is accumulated inside the matrix products (arXiv 2510.00206 calls
  that horizontal and vertical fusion).
- attention over a padding-free row is row_attention.py's.
- the loss runs the output head over supervised tokens only, some rows at a time, and leaves no
  logits behind.

A module that is not exactly of a known kind (DoRA, dropout, biases that are trained, weights in
8 bit, NF4 where products cannot dequantise it by blocks ...) keeps its own forward. Frozen weights
get no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from fastft.families import FAMILIES, Family, family_of
from fastft.kernels import native
from fastft.kernels.kept import Normed, keep, kept
from fastft.kernels.native import Matrix, Quantised, Sum, multiply
from fastft.kernels.row_attention import RowPlan, plan_nodes, plan_row, row_attention
from fastft.kernels.varlen import text_config

# --- LoRA projections


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias + scale (x A^T) B^T; without an adapter, A and B are None."""

    weight: Matrix  # (out, in), frozen
    bias: torch.Tensor | None  # (out,), frozen
    a: torch.nn.Parameter | None  # (r, in)
    b: torch.nn.Parameter | None  # (out, r)
    scale: float

    @property
    def rank(self) -> int:
        """r, or 0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]


def _project(
    x: torch.Tensor, projections: list[Projection], low: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return the outputs [(T, out)] for x (T, in), and S = x A^T of all adapters side by side (T,
    sum of r); `low`: S, where it is known.
    """
    stacked = _stacked_a(projections, x.dtype) if low is None else None
    if stacked is not None:
        low = x.new_empty(x.shape[0], stacked.shape[0])
        multiply(Sum(low, [(x, stacked.t())]))
    sums = []
    for p, columns in _with_columns(projections):
        terms = [(x, p.weight.t())]
        if low is not None and p.b is not None:
            terms.append((low[:, columns], _scaled_b(p, x.dtype).t()))
        sums.append(Sum(x.new_empty(x.shape[0], p.weight.shape[0]), terms, p.bias))
    multiply(*sums)
    return [s.out for s in sums], low


def _project_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    low: torch.Tensor | None,
    projections: list[Projection],
    need_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return (gradient of x, [dA, dB of each projection])."""
    dx = torch.empty_like(x) if need_x else None
    terms = [(grad, p.weight) for grad, p in zip(grads, projections, strict=True)]
    if low is None:
        if dx is not None:
            multiply(Sum(dx, terms))
        return dx, [None, None] * len(projections)
    dlow = torch.empty_like(low)
    columns = [columns for _, columns in _with_columns(projections)]
    adapted = [
        (g, p, c) for g, p, c in zip(grads, projections, columns, strict=True) if p.b is not None
    ]
    multiply(*(Sum(dlow[:, c], [(g, _scaled_b(p, g.dtype))]) for g, p, c in adapted))
    stacked = _stacked_a(projections, x.dtype)
    assert stacked is not None
    da = torch.empty(stacked.shape)
    # Transposed: the narrow matrix on the left is the faster product.
    db = [torch.empty(low[:, c].shape[1], g.shape[1]) for g, _, c in adapted]
    sums = [
        Sum(da, [(dlow.t(), x)]),
        *(Sum(b, [(low[:, c].t(), g)]) for b, (g, _, c) in zip(db, adapted, strict=True)),
    ]
    if dx is not None:
        sums.append(Sum(dx, [*terms, (dlow, stacked)]))
    multiply(*sums)
    results: list[torch.Tensor | None] = []
    slopes = iter(db)
    for p, c in zip(projections, columns, strict=True):
        if p.a is None or p.b is None:
            results += [None, None]
        else:
            results += [da[c].to(p.a.dtype), next(slopes).t().mul(p.scale).to(p.b.dtype)]
    return dx, results


def _with_columns(projections: list[Projection]) -> Iterator[tuple[Projection, slice]]:
    """Yield each projection with its columns of S; none for one without an adapter."""
    at = 0
    for p in projections:
        yield p, slice(at, at + p.rank)
        at += p.rank


def _stacked_a(projections: list[Projection], dtype: torch.dtype) -> torch.Tensor | None:
    a = [p.a.detach() for p in projections if p.a is not None]
    return torch.cat(a).to(dtype) if a else None


def _scaled_b(p: Projection, dtype: torch.dtype) -> torch.Tensor:
    assert p.b is not None
    b = p.b.detach()
    return (b if p.scale == 1 else b * p.scale).to(dtype)


def _parameters(projections: list[Projection]) -> list[Any]:
    """A and B as autograd has to see them."""
    return [parameter for p in projections for parameter in (p.a, p.b)]


class _Projections(Function):
    """Several projections of one x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        projections: list[Projection],
        normed: Normed | None,
        *parameters: Any,
    ) -> Any:
        outputs, low = _project(x, projections)
        keep(ctx, normed or x, low)
        ctx.projections = projections
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, low = kept(ctx)
        grads_list = [g.contiguous() for g in grads]
        dx, rest = _project_backward(grads_list, x, low, ctx.projections, ctx.needs_input_grad[0])
        return (dx, None, None, *rest)


class _GatedMLP(Function):
    """down(act(gate(x)) * up(x)); keeps gate and up, or (`again`) computes them twice, too; their
    product always.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        inner: list[Projection],
        outer: list[Projection],
        gelu: bool,
        normed: Normed | None,
        again: bool,
        *parameters: Any,
    ) -> Any:
        (gate, up), low_inner = _project(x, inner)
        (y,), low_outer = _project(native.glu_forward(gate, up, gelu), outer)
        kept_pair = (None, None) if again else (gate, up)
        keep(ctx, normed or x, *kept_pair, low_inner, low_outer)
        ctx.inner, ctx.outer, ctx.gelu = inner, outer, gelu
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, gate, up, low_inner, low_outer = kept(ctx)
        (outer,) = ctx.outer
        dy = dy.contiguous()
        if gate is None:
            (gate, up), _ = _project(x, ctx.inner, low_inner)
        dh = torch.empty_like(gate)
        terms = [(dy, outer.weight)]
        if outer.a is not None:
            dlow = torch.empty_like(low_outer)
            multiply(Sum(dlow, [(dy, _scaled_b(outer, dy.dtype))]))
            terms.append((dlow, outer.a.detach().to(dy.dtype)))
        multiply(Sum(dh, terms))
        # gate and up are their gradients from here on
        h = native.glu_backward_(dh, gate, up, ctx.gelu)
        rest_outer: list[torch.Tensor | None] = [None, None]
        if outer.a is not None:
            da, db = torch.empty(outer.a.shape), torch.empty(outer.b.shape[1], outer.b.shape[0])
            multiply(Sum(da, [(dlow.t(), h)]), Sum(db, [(low_outer.t(), dy)]))
            rest_outer = [da.to(outer.a.dtype), db.t().mul(outer.scale).to(outer.b.dtype)]
        del h, dh
        dx, rest_inner = _project_backward(
            [gate, up], x, low_inner, ctx.inner, ctx.needs_input_grad[0]
        )
        return (dx, *(None,) * 5, *rest_inner, *rest_outer)


# --- RMSNorm


class _RMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> torch.Tensor:
        y, rstd = native.rms_forward(x, weight, eps, plus_one)
        ctx.save_for_backward(x, weight, rstd)
        ctx.plus_one = plus_one
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        return native.rms_backward(dy.contiguous(), x, weight, rstd, ctx.plus_one), None, None, None


# --- the loss


class _HeadLoss(Function):
    """Sum of the cross entropies of hidden (N, H) through the head's weight (V, H), over
    `divisor`; `counts` (N,) says how often each counts (None: once).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counts: torch.Tensor | None,
        divisor: float,
        cap: float,
    ) -> torch.Tensor:
        backward = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64)
        grad = torch.empty_like(hidden) if backward else None
        # used again: its pages are there
        place = weight.new_empty(min(HEAD_ROWS, hidden.shape[0]), weight.shape[0])
        for first in range(0, hidden.shape[0], HEAD_ROWS):
            part = slice(first, first + HEAD_ROWS)
            logits = place[: len(targets[part])]
            multiply(Sum(logits, [(hidden[part], weight.t())]))
            losses = native.cross_entropy_(
                logits, targets[part], factor=1.0 / divisor, cap=cap, backward=backward
            ).double()
            total += (losses if counts is None else losses * counts[part]).sum()
            if grad is not None:
                multiply(Sum(grad[part], [(logits, weight)]))
        if grad is not None and counts is not None:
            grad *= counts[:, None]
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return (total / divisor).float()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return (
            (grad if dloss.item() == 1.0 else grad * dloss.to(grad.dtype)),
            *(None,) * 5,
        )


AT_WORK = 0.95
"""Of what a shorter row keeps, what a longer one may: the rest is for temporaries of its length."""
HEAD_ROWS = 256  # logits of 256 rows and 49,152 words are 24 MB in bfloat16; 512 are no faster


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    divisor: float,
    cap: float = 0.0,
) -> torch.Tensor:
    """Return the loss (float32 scalar) of hidden (B, T, H) predicting labels (B, T) one place
    further, -100 ignored.

    The sum of -log p over the supervised tokens, divided by `divisor`. Tokens without a label
    never meet the head.
    """
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    supervised = (targets != -100).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(supervised) < len(targets):
        rows = rows.index_select(0, supervised)
    return _HeadLoss.apply(  # type: ignore[no-any-return]
        rows.to(weight.dtype), weight, targets[supervised].contiguous(), None, float(divisor), cap
    )


def pair_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    pairs: torch.Tensor,
    divisor: float,
    cap: float = 0.0,
) -> torch.Tensor:
    """Return the loss (float32 scalar) of hidden (1, T, H) on `pairs` (3, P) of a trie row: index
    of a state, its target, how many sequences have this pair.
    """
    states, targets, counts = pairs
    rows = hidden[0].index_select(0, states).to(weight.dtype)
    often = None if bool((counts == 1).all()) else counts
    return _HeadLoss.apply(  # type: ignore[no-any-return]
        rows, weight, targets.contiguous(), often, float(divisor), cap
    )


# --- which modules are replaced


def _classes(part: str, suffix: str) -> dict[str, Family]:
    """Return {class name of transformers: family} of the modules that `part` stands in for."""
    rows = FAMILIES.values()
    return {f"{row.classes}{suffix}": row for row in rows if part in row.fused}


NORMS = _classes("norm", "RMSNorm")
MLPS = _classes("mlp", "MLP")
ATTENTIONS = _classes("attention", "Attention")
ACTIVATIONS = {"SiLUActivation": False, "SiLU": False, "GELUTanh": True, "PytorchGELUTanh": True}


class FusedLayers:
    """The replaced forwards of one model, found once and put in place for the length of a step."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.dtype = dtype
        self.config = text_config(model)
        self.forwards: list[tuple[Any, Callable[..., Any]]] = []
        self._row: tuple[Any, RowPlan] | None = None
        # The last norm's output, alive so that no other tensor can lie where it does.
        self._normed: tuple[torch.Tensor, Normed] | None = None
        # Bytes that a token's forward pass keeps in the replaced layers, and of these gate and up
        # of each MLP; `_most`: a forward pass keeps no more than one of so many tokens would.
        self._kept_bytes, self._pairs = 0, list[int]()
        self._most: int | None = None
        self._attending = 0  # layers with compiled attention
        # A and B of every plain LoRA layer, some twice
        self.adapters: list[torch.nn.Parameter] = []
        inside: set[int] = set()
        for module in self.owner.modules():
            if id(module) in inside:
                continue
            made = self._replacement(module)
            if made is None:
                continue
            forward, whole = made
            self.forwards.append((module, forward))
            if whole:
                inside |= {id(child) for child in module.modules()}

    @property
    def has_loss(self) -> bool:
        """Whether the loss is among the replaced parts, and takes `trie_pairs` for labels."""
        return any(module is self.owner for module, _ in self.forwards)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model computes with the fused layers; afterwards with what it had before."""
        before = [(module, module.__dict__.get("forward")) for module, _ in self.forwards]
        if torch.is_grad_enabled():
            self._make_gradients()
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            self._row = self._normed = None
            for module, original in before:
                if original is None:
                    del module.forward
                else:
                    module.forward = original

    @property
    def stretch(self) -> float:
        """How many times as many tokens a row can have, and keep no more for its backward pass: 1
        where attention is not compiled, or some layer has an attention or an MLP of its own.
        """
        layers = getattr(self.config, "num_hidden_layers", 0)
        if not self._attending == len(self._pairs) == layers > 0:
            return 1.0
        return self._kept_bytes / (self._kept_bytes - sum(self._pairs))

    @contextlib.contextmanager
    def keeping(self, tokens: int | None) -> Iterator[None]:
        """Inside, a forward pass keeps no more than one of `tokens` tokens would: as many MLPs as
        it takes compute gate and up again in the backward pass. None: all is kept.
        """
        self._most = tokens
        try:
            yield
        finally:
            self._most = None

    def _again(self, place: int, tokens: int) -> bool:
        """Whether the MLP at `place` computes gate and up of `tokens` tokens again."""
        if self._most is None:
            return False
        # What is only at work grows with the row, too, and one pair that is computed again is.
        pair = self._pairs[place]
        too_much = (1 - AT_WORK * self._most / tokens) * self._kept_bytes + pair
        return sum(self._pairs[:place]) < too_much

    def _make_gradients(self) -> None:
        """Make the adapters' gradients before the step, side by side.

        They outlive it; made during it, each lies where a large temporary was, which then has to
        go elsewhere: with checkpointed layers more than a quarter of the heap was such holes
        (docs/log.md).
        """
        for parameter in self.adapters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _replacement(self, module: Any) -> tuple[Callable[..., Any], bool] | None:
        """Return (forward, whether it also stands for the modules inside) of one module, or
        None.
        """
        kind = type(module).__name__
        if module is self.owner:
            forward = self._causal_lm(module)
            return (forward, False) if forward else None
        if kind in NORMS and module.weight.dtype == self.dtype and not module.weight.requires_grad:
            return self._norm(module, NORMS[kind].norms == "plus_one"), False
        if kind in MLPS:
            forward = self._mlp(module)
            return (forward, True) if forward else None
        if kind in ATTENTIONS:
            forward = self._attention(module, ATTENTIONS[kind])
            return (forward, False) if forward else None
        projection = self._projection(module, adapted_only=True)
        return (self._linear(projection), True) if projection else None

    def _projection(self, module: Any, adapted_only: bool = False) -> Projection | None:
        """Return what a linear layer or peft's layer around one computes, where that is plain
        LoRA, else None.
        """
        if (weight := self._weight(module)) is not None:
            return None if adapted_only else Projection(weight, module.bias, None, None, 0.0)
        if type(module) not in lora_kinds() or len(module.active_adapters) != 1:
            return None
        base, name = module.base_layer, module.active_adapters[0]
        if (
            name not in module.lora_A
            or name in module.lora_variant
            or module.merged
            or module.disable_adapters
        ):
            return None
        a: Any = module.lora_A[name]
        b: Any = module.lora_B[name]
        is_plain = (
            type(module.lora_dropout[name]) is torch.nn.Identity
            and a.bias is None
            and b.bias is None
        )
        weight = self._weight(base)
        if not is_plain or module.fan_in_fan_out or weight is None:
            return None
        self.adapters += [a.weight, b.weight]
        return Projection(weight, base.bias, a.weight, b.weight, float(module.scaling[name]))

    def _weight(self, module: Any) -> Matrix | None:
        """The frozen weight of a linear layer, in the computing type or in NF4; None for others."""
        if type(module) is torch.nn.Linear:
            return module.weight if self._frozen(module) else None
        # peft's wrapper has the same name, and hands on its base's weight: it is no plain layer.
        if type(module) not in nf4_layers() or not native.serves_nf4(module.weight, self.dtype):
            return None
        plain = module.bias is None or (
            module.bias.dtype == self.dtype and not module.bias.requires_grad
        )
        return Quantised(module.weight) if plain else None

    def _frozen(self, linear: Any) -> bool:
        parameters = [linear.weight] + ([] if linear.bias is None else [linear.bias])
        return all(p.dtype == self.dtype and not p.requires_grad for p in parameters)

    # --- the forwards

    def _linear(self, projection: Projection) -> Callable[..., Any]:
        projections = [projection]

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = _rows(x, self.dtype)
            (y,) = _Projections.apply(
                rows, projections, self._norm_of(rows), *_parameters(projections)
            )
            return y.view(*x.shape[:-1], -1)

        return forward

    def _norm(self, module: Any, plus_one: bool) -> Callable[..., Any]:
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        if len(module.weight) == self.config.hidden_size:  # others are counted by attention
            self._kept_bytes += len(module.weight) * self.dtype.itemsize

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = _rows(x, self.dtype)
            y = _RMSNorm.apply(rows, module.weight, eps, plus_one)
            if torch.is_grad_enabled():
                what = Normed(rows.detach(), module.weight.detach(), eps, plus_one)
                self._normed = y.detach(), what
            return y.view(x.shape)

        return forward

    def _norm_of(self, rows: torch.Tensor) -> Normed | None:
        """What `rows` was computed from, where it is the last norm's output; None for others."""
        if self._normed is None:
            return None
        y, what = self._normed
        same = y.data_ptr() == rows.data_ptr() and y.shape == rows.shape and y.dtype == rows.dtype
        return what if same and rows.is_contiguous() and rows._version == 0 else None

    def _normalise(
        self, x: torch.Tensor, norm: Any, dim: int
    ) -> tuple[torch.Tensor, Normed | None]:
        """Return `x` (T, heads * dim) through the `norm` of each head, and what it came from."""
        heads = norm(x.view(-1, dim))
        return heads.view(x.shape), self._norm_of(heads)

    def _mlp(self, module: Any) -> Callable[..., Any] | None:
        gelu = ACTIVATIONS.get(type(module.act_fn).__name__)
        found = [self._projection(p) for p in (module.gate_proj, module.up_proj, module.down_proj)]
        projections = [p for p in found if p is not None]
        if gelu is None or len(projections) < 3:
            return None
        inner, outer = projections[:2], projections[2:]
        place, size = len(self._pairs), self.dtype.itemsize
        self._pairs.append(sum(p.weight.shape[0] for p in inner) * size)
        self._kept_bytes += self._pairs[-1] + sum(p.rank for p in projections) * size

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = _rows(x, self.dtype)
            y = _GatedMLP.apply(
                rows,
                inner,
                outer,
                gelu,
                self._norm_of(rows),
                self._again(place, len(rows)),
                *_parameters(projections),
            )
            return y.view(x.shape)

        return forward

    def _attention(self, module: Any, family: Family) -> Callable[..., Any] | None:
        found = [self._projection(p) for p in (module.q_proj, module.k_proj, module.v_proj)]
        projections = [p for p in found if p is not None]
        if len(projections) < 3 or module.attention_dropout:
            return None
        original = type(module).forward
        holder = self.config if family.window_in_config else module
        window = getattr(holder, "sliding_window", None)
        dim, rotates = module.head_dim, getattr(module, "use_rope", True)
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        limit = _queries_grow_beyond(self.config)
        self._attending += native.attends(self.dtype, dim)  # other ways keep more of a tree
        widths = sum(p.weight.shape[0] for p in (projections[0], *projections))  # q, and the output
        self._kept_bytes += (widths + sum(p.rank for p in projections)) * self.dtype.itemsize

        def forward(
            hidden_states: torch.Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            boundaries, nodes = kwargs.get("cu_seq_lens_q"), kwargs.get("trie_nodes")
            cos, sin = position_embeddings
            plan = None if boundaries is None and nodes is None else self._plan(boundaries, nodes)
            if plan is None or cos.shape[-1] != dim or (limit and plan.longest > limit):
                return original(module, hidden_states, position_embeddings, *args, **kwargs)
            rows = _rows(hidden_states, self.dtype)
            q, k, v = _Projections.apply(
                rows, projections, self._norm_of(rows), *_parameters(projections)
            )
            normed: list[Normed | None] = [None, None]
            if q_norm is not None and k_norm is not None:
                q, normed[0] = self._normalise(q, q_norm, dim)
                k, normed[1] = self._normalise(k, k_norm, dim)
            rotary = (
                (cos[0].to(self.dtype).contiguous(), sin[0].to(self.dtype).contiguous())
                if rotates
                else None
            )
            out = row_attention(
                q, k, v, rotary, plan, dim, module.scaling, window, normed=(normed[0], normed[1])
            )
            return module.o_proj(out.view(*hidden_states.shape[:-1], -1)), None

        return forward

    def _plan(self, boundaries: Any, nodes: torch.Tensor | None) -> RowPlan:
        """The layout of the row at hand, worked out once for all layers."""
        key = boundaries if nodes is None else nodes
        if self._row is None or self._row[0] is not key:
            self._row = (key, plan_row(boundaries) if nodes is None else plan_nodes(nodes))
        return self._row[1]

    def _causal_lm(self, module: Any) -> Callable[..., Any] | None:
        head = module.get_output_embeddings()
        family = family_of(self.config.model_type)
        odd = {"logits_soft_cap", "logit_scale", "logits_scaling", "output_multiplier_scale"}
        odd -= {family.head_divisor}
        if (
            "head" not in family.fused
            or type(head) is not torch.nn.Linear
            or head.bias is not None
            or not self._frozen(head)
            or getattr(self.config, "output_router_logits", False)
            or any(getattr(self.config, name, None) not in (None, 1, 1.0) for name in odd)
        ):
            return None
        cap = float(getattr(self.config, "final_logit_softcapping", None) or 0.0)
        divisor = (
            float(getattr(self.config, family.head_divisor, 1.0)) if family.head_divisor else 1.0
        )
        inner = getattr(module, module.base_model_prefix)
        original = module.forward
        from transformers.modeling_outputs import CausalLMOutputWithPast

        def forward(
            *args: Any,
            labels: Any = None,
            num_items_in_batch: Any = None,
            trie_pairs: Any = None,
            **kwargs: Any,
        ) -> Any:
            if trie_pairs is None and (labels is None or num_items_in_batch is None):
                given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
                return original(
                    *args, **{k: v for k, v in given.items() if v is not None}, **kwargs
                )
            hidden = inner(*args, **kwargs).last_hidden_state
            hidden = hidden if divisor == 1.0 else hidden / divisor
            over = float(num_items_in_batch)
            return CausalLMOutputWithPast(
                loss=head_loss(hidden, head.weight, labels, over, cap)
                if trie_pairs is None
                else pair_loss(hidden, head.weight, trie_pairs, over, cap)
            )

        return forward


def _queries_grow_beyond(config: Any) -> int:
    """Return the position from which queries are scaled up (llama_4_scaling_beta); 0 for never."""
    rope = getattr(config, "rope_parameters", None) or {}
    grows = rope.get("llama_4_scaling_beta")
    return int(rope["original_max_position_embeddings"]) if grows else 0


def nf4_layers() -> set[type]:
    """Return bitsandbytes' linear layer with 4-bit weights, where it is installed."""
    from peft import import_utils

    if not import_utils.is_bnb_4bit_available():
        return set()
    from bitsandbytes.nn import Linear4bit

    return {Linear4bit}


def lora_kinds() -> set[type]:
    """Return peft's LoRA layers around a linear one, plain or (where bitsandbytes is there) NF4."""
    from peft import import_utils
    from peft.tuners import lora

    kinds: set[type] = {lora.Linear}
    if import_utils.is_bnb_4bit_available():
        from peft.tuners.lora.bnb import Linear4bit

        kinds.add(Linear4bit)
    return kinds


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
