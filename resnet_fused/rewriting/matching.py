"""Tails found in a graph: a batch norm that a ReLU follows, maybe after a sum. And why other batch norms begin none."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..calls import CONVOLUTIONS, is_plain
from .tracing import BATCH_NORMS, is_plain_sequential

RETURNED = "its output is returned"

_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}
_CONSUMERS = nn.modules.conv._ConvNd | nn.modules.pooling._MaxPoolNd


class Tail(NamedTuple):
    """relu(batch_norm(input)), relu(batch_norm(input) + residual) or relu(batch_norm(input) + batch_norm(residual))."""

    batch_norm: fx.Node
    relu: fx.Node
    add: fx.Node | None
    residual_norm: fx.Node | None  # where the residual is the output of another batch norm
    convolutions: tuple[fx.Node, ...] = ()  # those with a bias that the tail may take over: of the input, the residual
    consumer: fx.Node | None = None  # a convolution or max pooling, if that alone takes the output, and there is no add

    @property
    def batch_norms(self):
        return tuple(filter(None, (self.batch_norm, self.residual_norm)))

    @property
    def steps(self):
        """None before one that it needs."""
        return tuple(filter(None, (self.residual_norm, self.batch_norm, self.add, self.relu)))

    @property
    def input(self):
        return self.batch_norm.all_input_nodes[0]

    @property
    def residual(self):
        if self.residual_norm:
            return self.residual_norm.all_input_nodes[0]
        return _other_operand(self.add, self.batch_norm) if self.add else None

    @property
    def adds_in_place(self):
        return self.add.target in _IN_PLACE_ADDS if self.add else None

    @property
    def normalizes_residual_first(self):
        return self.residual_norm is not None and self.batch_norm in _between(self.residual_norm, self.add)


def is_batch_norm(module):
    """Whether it is a batch norm of any kind: those that are no nn.BatchNorm are known by the name of their class."""
    name = getattr(module, "original_name", type(module).__name__)  # original_name: of a scripted module
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in name


def batch_norms(module, prefix=""):
    """Names and modules of the batch norms that the module may call itself: its own, its lists' and Sequentials'."""
    for name, child in module.named_children() if prefix or not _only_holds_layers(module) else ():
        if is_batch_norm(child):
            yield prefix + name, child
        elif _only_holds_layers(child) or is_plain_sequential(child):
            yield from batch_norms(child, f"{prefix}{name}.")


def _only_holds_layers(module):
    """Whether it has no forward, as an nn.ModuleList has none."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is nn.Module.forward


def find_tails(module, graph):
    """The tails in a graph of the module, and, for each further batch norm in it, by name, why it begins none; and the
    names of the plain nn.Identity that the graph called, and calls no more."""
    matcher = _Matcher(module, graph)
    tails, reasons, identities = [], {}, matcher.drop_identities()
    for node in graph.nodes:
        if not matcher.calls_batch_norm(node) or any(node is tail.residual_norm for tail in tails):
            continue
        try:
            if adder := next((tail for tail in tails if tail.residual is node), None):
                raise _NoTail(f"its output is added to that of {adder.batch_norm.target}, which is fused")
            tails.append(matcher.tail(node))
        except _NoTail as reason:
            reasons[node.target] = str(reason)
    for name in (node.target for tail in tails for node in tail.batch_norms):
        reasons.pop(name, None)
    return tails, reasons, identities


class _NoTail(Exception):
    """Why a batch norm begins no tail."""


class _Matcher:
    def __init__(self, module, graph):
        self.graph = graph
        self.layers = dict(module.named_modules(remove_duplicate=False))

    def layer(self, node):
        """The layer that the node calls with a tensor and no more, or None."""
        is_call = node.op == "call_module" and len(node.args) + len(node.kwargs) == len(node.all_input_nodes) == 1
        return self.layers[node.target] if is_call else None

    def drop_identities(self):
        names = set()
        for node in self.graph.nodes:
            if is_plain(self.layer(node), nn.Identity):
                names.add(node.target)
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)
        return names

    def calls_batch_norm(self, node):
        return node.op == "call_module" and is_batch_norm(self.layers[node.target])

    def tail(self, batch_norm):
        """The tail that the batch norm begins; else raises _NoTail."""
        self._check(batch_norm)
        user, add, residual_norm = self._only_user(batch_norm), None, None
        if operands := _operands(user):
            add = user
            if add.target in _IN_PLACE_ADDS and operands[0] is not batch_norm:
                raise _NoTail(f"its output is added in place to {self._label(operands[0])}")
            residual_norm = self._residual_norm(batch_norm, add)
            self._check_input(batch_norm, add, residual_norm)
            user = self._only_user(add)
        if not self._is_relu(user):
            fate = "returned" if user.op == "output" else f"used by {self._label(user)}"
            raise _NoTail(f"its output is {fate if add is None else f'added, and the sum {fate}'}")
        tail = Tail(batch_norm, user, add, residual_norm)
        convolutions = tuple(filter(self._leaves_its_bias, (tail.input, tail.residual)))
        consumers = [node for node in user.users if add is None and isinstance(self.layer(node), _CONSUMERS)]
        return tail._replace(
            convolutions=convolutions, consumer=consumers[0] if consumers and len(user.users) == 1 else None
        )

    def _leaves_its_bias(self, node):
        """Whether the node is a convolution with a bias, whose output nobody else takes."""
        layer = self.layer(node) if node and len(node.users) == 1 else None
        return type(layer) in CONVOLUTIONS and layer.bias is not None

    def _residual_norm(self, batch_norm, add):
        """The batch norm whose output is the other operand, and is nothing else."""
        residual = _other_operand(add, batch_norm)
        if not self.calls_batch_norm(residual) or len(residual.users) > 1:
            return None
        try:
            self._check(residual)
            self._check_input(residual, add, batch_norm)
        except _NoTail:
            return None
        return residual

    def _check(self, batch_norm):
        layer = self.layers[batch_norm.target]
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise _NoTail("it is lazy and not initialised: run one batch first")
        if type(layer) not in BATCH_NORMS:
            raise _NoTail(f"a {type(layer).__name__}")
        if not is_plain(layer):
            raise _NoTail("it has hooks or a forward of its own")
        names = [name for name, other in self.layers.items() if other is layer]
        mentions = [node for node in self.graph.nodes if f"{node.target}.".startswith(f"{batch_norm.target}.")]
        if len(names) > 1 or len(mentions) > 1:
            raise _NoTail("it is used twice")
        if self.layer(batch_norm) is None:
            raise _NoTail("it is called with more than a tensor")

    def _only_user(self, node):
        if len(node.users) == 1:
            return next(iter(node.users))
        output = "its output" if node.op == "call_module" else "the sum"
        raise _NoTail(f"{output} is used by {', '.join(map(self._label, node.users)) or 'nothing'}")

    def _is_relu(self, node):
        arguments = (*node.args, *node.kwargs.values())
        tensors = [argument for argument in arguments if not isinstance(argument, bool)]  # without inplace
        is_function = node.target in _RELUS and node.op != "call_module" and len(tensors) == 1
        return is_function or is_plain(self.layer(node), nn.ReLU)

    def _check_input(self, batch_norm, add, other_norm):
        """The batch norm is to run when the add does: until then, nobody may change its input."""
        (input,) = batch_norm.all_input_nodes
        is_its_own = isinstance(self.layer(input), nn.modules.conv._ConvNd | nn.Linear) and len(input.users) == 1
        between = [node for node in _between(batch_norm, add) if node is not other_norm]
        if between and not is_its_own:
            raise _NoTail("what runs between it and the add might change its input")
        if any(self._shares_statistics(batch_norm, node) for node in between if node.op == "call_module"):
            raise _NoTail("what runs between it and the add updates the same statistics")

    def _shares_statistics(self, batch_norm, node):
        mine, theirs = (self.layers[name].buffers() for name in (batch_norm.target, node.target))
        return not set(map(id, mine)).isdisjoint(map(id, theirs))

    def _label(self, node):
        if node.op == "output":
            return "the output"
        if node.op == "call_module":
            layer = self.layers[node.target]
            own = "" if is_plain(layer) else ", with hooks or a forward of its own"
            return f"{node.target} ({type(layer).__name__}{own})"
        if node.op in ("placeholder", "get_attr"):
            return node.target
        return f"{getattr(node.target, '__name__', node.target)}()"


def _operands(node):
    """The two nodes that the node adds, or None where it does something else."""
    if node.op == "call_module" or node.target not in _ADDS | _IN_PLACE_ADDS:
        return None
    kwargs = {name: value for name, value in node.kwargs.items() if name != "alpha" or value != 1}
    operands = (*node.args, *kwargs.values())
    are_nodes = [type(operand) for operand in operands] == [fx.Node, fx.Node]
    return operands if are_nodes and kwargs.keys() <= {"input", "other"} and operands[0] is not operands[1] else None


def _other_operand(add, node):
    return next(other for other in add.all_input_nodes if other is not node)


def _between(node, end):
    """The nodes after the one and before the other."""
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 : nodes.index(end)]
