"""Tails found in a graph: a batch norm that a ReLU follows, maybe after a sum. And why other batch norms begin none."""

import itertools
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..calls import CONVOLUTIONS, is_plain
from .tracing import is_sequential

RETURNED = "its output is returned"

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}
_CONSUMERS = nn.modules.conv._ConvNd | nn.modules.pooling._MaxPoolNd


class Tail(NamedTuple):
    """relu(batch_norm(input)), relu(batch_norm(input) + residual) or relu(batch_norm(input) + batch_norm(residual))."""

    steps: tuple[fx.Node, ...]  # from the batch norm to the ReLU, with every nn.Identity between
    add: fx.Node | None = None  # among them
    residual_steps: tuple[fx.Node, ...] = ()  # from the residual's batch norm to before the add
    consumer: fx.Node | None = None  # a convolution or max pooling, if that alone takes the output, and there is no add
    convolutions: tuple[fx.Node, ...] = ()  # those with a bias that the tail may take over: of the input, the residual

    @property
    def batch_norm(self):
        return self.steps[0]

    @property
    def batch_norms(self):
        return (self.batch_norm, *self.residual_steps[:1])

    @property
    def input(self):
        return self.batch_norm.all_input_nodes[0]

    @property
    def residual(self):
        if self.residual_steps:
            return self.residual_steps[0].all_input_nodes[0]
        return _other_operand(self.add, self.steps) if self.add else None

    @property
    def all_steps(self):
        """None before one that it needs."""
        return (*self.residual_steps, *self.steps)

    @property
    def adds_in_place(self):
        return self.add.target in _IN_PLACE_ADDS

    @property
    def normalizes_residual_first(self):
        return self.batch_norm in _between(self.residual_steps[0], self.add)

    @property
    def sequentials(self):
        """The names of the Sequentials that it is in with some of its steps."""
        return frozenset().union(*map(_sequentials_around, self.all_steps))

    @property
    def is_inside_one(self):
        """Whether it is in a Sequential with all of its steps."""
        return bool(frozenset.intersection(*map(_sequentials_around, self.all_steps)))


def _sequentials_around(node):
    names = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return frozenset(names[:-1] if node.op == "call_module" else names)


def is_batch_norm(module):
    """Whether it is a batch norm of any kind: those that are no nn.BatchNorm are known by the name of their class."""
    name = getattr(module, "original_name", type(module).__name__)  # original_name: of a scripted module
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in name


def batch_norms(module, prefix=""):
    """Names and modules of the batch norms that the module may call itself: its own, its lists' and Sequentials'."""
    for name, child in module.named_children():
        if is_batch_norm(child):
            yield prefix + name, child
        elif isinstance(child, torch.jit.ScriptModule):
            continue
        elif has_no_forward(child) or (is_sequential(child) and is_plain(child, type(child))):
            yield from batch_norms(child, f"{prefix}{name}.")


def has_no_forward(module):
    """Whether it only holds layers, as an nn.ModuleList does."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is nn.Module.forward


def find_tails(module, graph):
    """The tails in a graph of the module, and, for each further batch norm in it, by name, why it begins none."""
    matcher = _Matcher(module, graph)
    tails, reasons = [], {}
    for node in graph.nodes:
        if not matcher.calls_batch_norm(node) or any(node in tail.residual_steps for tail in tails):
            continue
        try:
            if adder := next((tail for tail in tails if tail.residual is node), None):
                raise _NoTail(f"its output is added to that of {adder.batch_norm.target}, which is fused")
            tails.append(matcher.tail(node))
        except _NoTail as reason:
            reasons[node.target] = str(reason)
    for tail in tails:
        for node in tail.residual_steps[:1]:
            reasons.pop(node.target, None)
    return tails, reasons


class _NoTail(Exception):
    """Why a batch norm begins no tail."""


class _Matcher:
    def __init__(self, module, graph):
        self.graph = graph
        self.layers = dict(module.named_modules(remove_duplicate=False))

    def tail(self, batch_norm):
        """The tail that the batch norm begins; else raises _NoTail."""
        self._check(batch_norm)
        steps, add, residual_steps = [batch_norm], None, ()
        user = self._only_user(steps)
        if operands := _operands(user):
            add = user
            if add.target in _IN_PLACE_ADDS and operands[0] is not steps[-1]:
                raise _NoTail(f"its output is added in place to {self._label(operands[0])}")
            residual_steps = self._residual_steps(steps, add)
            self._check_input(steps, add, residual_steps)
            steps.append(add)
            user = self._only_user(steps)
        if not self._is_relu(user):
            fate = "returned" if user.op == "output" else f"used by {self._label(user)}"
            raise _NoTail(f"its output is {fate if add is None else f'added, and the sum {fate}'}")
        tail = Tail((*steps, user), add, residual_steps, None if add else self._consumer(user))
        inputs = tail.input, *((tail.residual,) if add else ())
        return tail._replace(convolutions=tuple(node for node in inputs if self._has_a_bias(node)))

    def _has_a_bias(self, node):
        """Whether the node is a plain convolution with a bias, whose output nobody else takes."""
        layer = self.layers[node.target] if node.op == "call_module" else None
        is_convolution = type(layer) in CONVOLUTIONS and self._is_call(node, type(layer))
        return is_convolution and layer.bias is not None and len(node.users) == 1

    def _residual_steps(self, steps, add):
        """Those of the batch norm whose output is the other operand, and is nothing else."""
        residual_steps = [_other_operand(add, steps)]
        while self._is_call(residual_steps[0], nn.Identity):
            residual_steps.insert(0, residual_steps[0].all_input_nodes[0])
        if not self.calls_batch_norm(residual_steps[0]) or any(len(step.users) > 1 for step in residual_steps):
            return ()
        try:
            self._check(residual_steps[0])
            self._check_input(residual_steps, add, steps)
        except _NoTail:
            return ()
        return tuple(residual_steps)

    def calls_batch_norm(self, node):
        return node.op == "call_module" and is_batch_norm(self.layers[node.target])

    def _check(self, batch_norm):
        layer = self.layers[batch_norm.target]
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise _NoTail("it is lazy and not initialised: run one batch first")
        if type(layer) not in BATCH_NORMS:
            raise _NoTail(f"a {type(layer).__name__}")
        if not is_plain(layer, type(layer)):
            raise _NoTail("it has hooks or a forward of its own")
        names = [name for name, other in self.layers.items() if other is layer]
        mentions = [node for node in self.graph.nodes if f"{node.target}.".startswith(f"{batch_norm.target}.")]
        if len(names) > 1 or len(mentions) > 1:
            raise _NoTail("it is used twice")
        if len(batch_norm.args) + len(batch_norm.kwargs) != 1 or len(batch_norm.all_input_nodes) != 1:
            raise _NoTail("it is called with more than a tensor")

    def _only_user(self, steps):
        """Of the last step's output; each nn.Identity on the way becomes a step."""
        while True:
            users = steps[-1].users
            if len(users) != 1:
                output = "its output" if steps[-1].op == "call_module" else "the sum"
                raise _NoTail(f"{output} is used by {', '.join(map(self._label, users)) or 'nothing'}")
            (user,) = users
            if not self._is_call(user, nn.Identity):
                return user
            steps.append(user)

    def _consumer(self, node):
        """The convolution or max pooling that alone takes the node's output, maybe through nn.Identity; or None."""
        while len(node.users) == 1:
            (node,) = node.users
            if node.op != "call_module" or len(node.args) + len(node.kwargs) != 1:
                return None
            if isinstance(self.layers[node.target], _CONSUMERS):
                return node
            if not self._is_call(node, nn.Identity):
                return None
        return None

    def _is_call(self, node, layer_class):
        is_call = node.op == "call_module" and len(node.args) + len(node.kwargs) == 1
        return is_call and is_plain(self.layers[node.target], layer_class)

    def _is_relu(self, node):
        arguments = (*node.args, *node.kwargs.values())
        tensors = [argument for argument in arguments if not isinstance(argument, bool)]  # without inplace
        is_function = node.target in _RELUS and node.op != "call_module" and len(tensors) == 1
        return is_function or self._is_call(node, nn.ReLU)

    def _check_input(self, steps, add, other_steps):
        """The batch norm is to run when the add does: until then, nobody may change its input."""
        (input,) = steps[0].all_input_nodes
        comes_from = self.layers.get(input.target) if input.op == "call_module" else None
        is_its_own = isinstance(comes_from, nn.modules.conv._ConvNd | nn.Linear) and len(input.users) == 1
        between = [node for node in _between(steps[0], add) if node not in (*steps, *other_steps)]
        if between and not is_its_own:
            raise _NoTail("what runs between it and the add might change its input")
        if any(self._shares_statistics(steps[0], node) for node in between if node.op == "call_module"):
            raise _NoTail("what runs between it and the add updates the same statistics")

    def _shares_statistics(self, batch_norm, node):
        mine, theirs = (self.layers[name].buffers() for name in (batch_norm.target, node.target))
        return not set(map(id, mine)).isdisjoint(map(id, theirs))

    def _label(self, node):
        if node.op == "output":
            return "the output"
        if node.op == "call_module":
            layer = self.layers[node.target]
            own = "" if is_plain(layer, type(layer)) else ", with hooks or a forward of its own"
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


def _other_operand(add, steps):
    return next(node for node in add.all_input_nodes if node not in steps)


def _between(node, end):
    """The nodes after the one and before the other."""
    following = itertools.accumulate(itertools.repeat(node.next), lambda current, _: current.next)
    return itertools.takewhile(lambda current: current is not end, following)
