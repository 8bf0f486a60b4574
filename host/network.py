"""A traced network as a list of call sites that can be replayed: whole, up to a cut, or with other normalisation.

Replaying in Python and tracing the replay again (`torch.export`) replaces graph surgery: the frozen backbone, the
adaptable teacher and every capture pass are the same interpreter with another `norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from edgesolve.host.errors import ModelError
from edgesolve.host.quiet import quiet

aten = torch.ops.aten
_BATCH_NORMS = (
    aten._native_batch_norm_legit_no_training.default,
    aten.batch_norm.default,
)
_BATCH_DEPENDENT = (
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit.default,
)
_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
)
_FOLDABLE = (*_CONVOLUTIONS, aten.linear.default)
_REDUCTIONS = (
    aten.pad.default,
    aten.mean.dim,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.dropout.default,
    aten.clone.default,
)
_OTHER_CONVOLUTIONS = (aten.conv_transpose2d.input, aten.conv3d.default, aten.convolution.default)


Layer = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation call site over `channels`; `layer` is the foldable call site before it, if it has one.

    `virtual`: the network has no normalisation here; its statistics were measured so that it can be adapted.
    """

    name: str
    node: str
    channels: int
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    layer: str | None
    virtual: bool = False

    def scale(self) -> Tensor:
        return self.gamma / torch.sqrt(self.var + self.eps)


@dataclass(frozen=True, slots=True)
class Cut:
    """A place through which everything flows: the output of `node`; `name` is the first module after it."""

    node: str
    name: str
    shape: tuple[int, ...]  # without the batch
    params_after: int
    macs_after: int


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode: call sites in order, constants by name, its normalisations.

    `example` (2, …) float32 is what it was traced with.
    """

    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    norms: tuple[Norm, ...]
    example: Tensor
    last_use: dict[str, tuple[str, ...]]

    @property
    def by_node(self) -> dict[str, Norm]:
        return {norm.node: norm for norm in self.norms}

    def run(
        self,
        x: Tensor,
        *,
        until: str | None = None,
        norm: Callable[[Norm, Tensor], Tensor] | None = None,
        layers: Mapping[str, Layer] | None = None,
        watch: Callable[[Node, Tensor, tuple], None] | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output of node `until` (of the network by default) for inputs `x` (n, …).

        `norm(site, y)` replaces each normalisation; `layers[node] = (weight, bias)` replaces a layer's
        parameters, `layers[node] = f` the layer itself by f(its input);
        `watch(node, output, inputs)` sees every call; `constants` overrides stored tensors.
        """
        stop = len(self.nodes) if until is None else self.index(until) + 1
        values: dict[str, object] = {self.input: x}
        self.advance(values, 0, stop, norm=norm, layers=layers, watch=watch, constants=constants)
        return self.result(values) if until is None else values[until]

    def advance(
        self,
        values: dict[str, object],
        start: int,
        stop: int,
        *,
        norm: Callable[[Norm, Tensor], Tensor] | None = None,
        layers: Mapping[str, Layer] | None = None,
        watch: Callable[[Node, Tensor, tuple], None] | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Run the call sites start..stop-1 on `values`, the live outputs by name, in place.

        Outputs that nothing after their last reader needs are dropped, so `values` is what a later call takes
        on from. Options as in `run`.
        """
        constants = self.constants if constants is None else constants
        sites = self.by_node
        for node in self.nodes[start:stop]:
            if node.op == "get_attr":
                values[node.name] = constants[str(node.target)]
            elif node.op == "call_function":
                values[node.name] = self._call(node, values, norm, layers, sites, watch)
            if node.op == "output":
                return
            for name in self.last_use.get(node.name, ()):
                values.pop(name, None)

    def result(self, values: Mapping[str, object]) -> Tensor:
        """The network's output among `values` that were advanced to the end."""
        last = self.nodes[-1]
        return torch.fx.node.map_arg(_single(last.args[0]), lambda n: values[n.name])

    @property
    def input(self) -> str:
        return next(n.name for n in self.nodes if n.op == "placeholder")

    def index(self, name: str) -> int:
        """Position of the call site `name`. Raises ModelError."""
        for i, node in enumerate(self.nodes):
            if node.name == name:
                return i
        raise ModelError(f"{name}: no such call site in the traced network.")

    def _call(self, node, values, norm, layers, sites, watch):
        args = torch.fx.node.map_arg(node.args, lambda n: values[n.name])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n.name])
        site = sites.get(node.name)
        if layers is not None and node.name in layers:
            value = _layer(node, layers[node.name], args, kwargs)
        elif node.target in _BATCH_NORMS and site is not None and norm is not None:
            value = norm(site, args[0])
            if node.target is _BATCH_NORMS[0]:
                value = (value,)
        else:
            value = node.target(*args, **kwargs)
        if site is not None and site.virtual and norm is not None:
            value = norm(site, value)
        if watch is not None and isinstance(value, Tensor):
            watch(node, value, args)
        return value


def _layer(node: Node, layer: Layer, args: tuple, kwargs: dict):
    if isinstance(layer, tuple):
        weight, bias = layer
        return node.target(args[0], weight, bias, *args[3:], **kwargs)
    return layer(args[0])


def trace(model: nn.Module | torch.export.ExportedProgram, shape: tuple[int, ...]) -> Network:
    """Trace `model` on inputs (n, *shape), n free, in evaluation mode. Raises ModelError with one sentence."""
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with quiet():  # the exporter warns about its own interfaces
        given = isinstance(model, torch.export.ExportedProgram)
        program = model if given else _export(model, example)
        graph = program.run_decompositions({}).module()
    nodes = tuple(
        n for n in graph.graph.nodes if not (n.op == "call_module" and "_guards" in str(n.target))
    )
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"the model takes {len(inputs)} inputs, expected one batch of frames.")
    names = [str(n.target) for n in nodes if n.op == "get_attr"]
    constants = {name: _attribute(graph, name).detach() for name in names}
    _check_finite(constants)
    for node in nodes:
        if node.target in _BATCH_DEPENDENT:
            raise ModelError(
                f"{module_of(node) or node.name} has no running statistics, so its output depends on "
                "the batch. Track them, or replace the layer."
            )
    order = {n.name: i for i, n in enumerate(nodes)}
    last: dict[str, list[str]] = {}
    for node in nodes:
        users = [user.name for user in node.users if user.name in order]
        if users and node.op != "get_attr":
            last.setdefault(max(users, key=order.__getitem__), []).append(node.name)
    norms = tuple(_norm(n, constants) for n in nodes if n.target in _BATCH_NORMS)
    network = Network(nodes, constants, norms, example, {k: tuple(v) for k, v in last.items()})
    try:
        with torch.no_grad():
            output = network.run(torch.cat([example, example[:1]]))
    except RuntimeError as error:
        raise ModelError(
            "the .pt2 file was exported with a fixed batch size; export it with a free first dimension: "
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('n')},))."
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the model returns {found}, expected logits of shape (n, classes).")
    return network


def _export(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    free = ({0: torch.export.Dim("n", min=1, max=65536)},)
    try:
        return torch.export.export(model.eval(), (example,), dynamic_shapes=free)
    except Exception as error:
        line = str(error).strip().splitlines()[0][:240]
        raise ModelError(
            f"torch.export cannot trace the model on inputs {tuple(example.shape)}: {line} "
            "Fix the branch or the shape, or pass a .pt2 file."
        ) from error


def _norm(node: Node, constants: dict[str, Tensor]) -> Norm:
    x, *given = node.args
    if len(given) < 6 and "running_mean" not in str(node.args[3]):
        raise ModelError(f"{node.name}: this normalisation has no running statistics; track them.")
    gamma, beta, mean, var = (None if a is None else constants[str(a.target)] for a in given[:4])
    eps = float(given[5] if node.target is _BATCH_NORMS[0] else node.args[7])
    if mean is None or var is None:
        raise ModelError(
            f"{node.name} has no running statistics, so its output depends on the batch. "
            "Track them, or replace the layer."
        )
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    foldable = (
        x.target in _FOLDABLE and len([u for u in x.users if "_guards" not in str(u.target)]) == 1
    )
    layer = x.name if foldable and x.op == "call_function" else None
    return Norm(
        module_of(node) or node.name, node.name, len(mean), gamma, beta, mean, var, eps, layer
    )


def module_of(node: Node) -> str:
    """The dotted path of the innermost module that `node` was traced from, or ''."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return path.removeprefix("L['self'].").removeprefix("L__self__").strip("._")


def source_layer(network: Network, node: str) -> Node:
    return next(n for n in network.nodes if n.name == node)


def layer_parameters(network: Network, node: Node) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution or linear call site."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = network.constants[str(node.args[1].target)]
    return weight, None if bias is None else network.constants[str(bias.target)]


def costs(network: Network) -> dict[str, tuple[int, int]]:
    """Per call site: (parameters that it is the first to read, multiply-adds for one item)."""
    seen: set[str] = set()
    table: dict[str, tuple[int, int]] = {}

    def watch(node: Node, value: Tensor, args: tuple) -> None:
        fresh = {str(a.target) for a in node.all_input_nodes if a.op == "get_attr"} - seen
        seen.update(fresh)
        table[node.name] = (_trainable(node, fresh, network), _macs(node, value, args))

    with torch.no_grad():
        network.run(network.example, watch=watch)
        for node in network.nodes:  # normalisations return tuples, which `watch` doesn't see
            if node.target is _BATCH_NORMS[0]:
                fresh = {str(a.target) for a in node.args[1:3] if isinstance(a, Node)} - seen
                seen.update(fresh)
                table[node.name] = (_trainable(node, fresh, network), 0)
    return table


def _trainable(node: Node, names: set[str], network: Network) -> int:
    statistics = (
        {str(a.target) for a in node.args[3:5] if isinstance(a, Node)}
        if node.target in _BATCH_NORMS
        else set()
    )
    return sum(network.constants[name].numel() for name in names - statistics)


def _macs(node: Node, value: Tensor, args: tuple) -> int:
    if node.target in (*_CONVOLUTIONS, *_OTHER_CONVOLUTIONS):
        weight = args[1]
        if node.target is _OTHER_CONVOLUTIONS[0]:  # every input element meets weight[0]
            return args[0][0].numel() * weight[0].numel()
        return value[0].numel() * weight[0].numel()
    if node.target is aten.linear.default:
        return value[0].numel() * args[1].shape[1]
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return value[0].numel() * args[0].shape[-1]
    return 0


def cuts(network: Network) -> list[Cut]:
    """Places where one tensor of shape (n, d) or (n, d, h, w) carries everything, shallow first.

    One per number of parameters after it: activations and poolings belong to the backbone, paddings and the
    averages before a classifier to what is replaced, since a head that gates positions must see them.
    """
    order = {n.name: i for i, n in enumerate(network.nodes)}
    cost = costs(network)
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        network.run(
            network.example, watch=lambda n, v, _: shapes.__setitem__(n.name, tuple(v.shape[1:]))
        )
    found: dict[int, Cut] = {}
    normalised = {norm.layer for norm in network.norms if not norm.virtual}
    reach = -1  # the furthest reader of anything computed so far
    for node in network.nodes:
        if node.op in ("get_attr", "output") or node.target is aten.sym_size.int:
            continue
        here, shape = order[node.name], shapes.get(node.name, ())
        params = sum(cost.get(n.name, (0, 0))[0] for n in network.nodes[here + 1 :])
        single = node.op == "call_function" and reach <= here and node.name not in normalised
        if single and params and len(shape) in (1, 3):
            if node.target not in _REDUCTIONS or params not in found:
                macs = sum(cost.get(n.name, (0, 0))[1] for n in network.nodes[here + 1 :])
                found[params] = Cut(node.name, _module_after(network, here), shape, params, macs)
        users = [
            order[u.name]
            for u in node.users
            if u.name in order and u.target is not aten.sym_size.int
        ]
        reach = max([reach, *users])
    return sorted(found.values(), key=lambda cut: -cut.params_after)


def _module_after(network: Network, index: int) -> str:
    following = (module_of(n) for n in network.nodes[index + 1 :] if n.op == "call_function")
    return next((path for path in following if path), network.nodes[index].name)


def _check_finite(constants: dict[str, Tensor]) -> None:
    for name, value in constants.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"{name}: the weights hold NaN or inf. Load another checkpoint.")


def _attribute(module: nn.Module, path: str) -> Tensor:
    value = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _single(output):
    if isinstance(output, (tuple, list)) and len(output) == 1:
        return output[0]
    return output
