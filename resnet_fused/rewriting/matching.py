"""Tails in a graph, a batch norm that a ReLU follows, maybe after a sum, and the calls that take their place."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..calls import CONVOLUTIONS, call_recomputing, call_tail, convolve, is_plain
from .tracing import BATCH_NORMS, is_plain_sequential

RETURNED = "its output is returned"
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}
_CONSUMERS = nn.modules.conv._ConvNd | nn.modules.pooling._MaxPoolNd


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


class _NoTail(Exception):
    """Why a batch norm begins no tail."""


class Tails:
    """Those in a graph of the module, which are replaced by one call each."""

    def __init__(self, module, graph, memory_efficient):
        self.graph = graph
        self.layers = dict(module.named_modules(remove_duplicate=False))
        self.fused = []  # names of batch norms
        self.reasons = {}  # of the other ones, by name
        self.bypassed = set()  # names of layers that are called no more
        self.convolved = set()  # and of convolutions that leave out their bias
        for node in graph.nodes:
            if is_plain(self._layer(node), nn.Identity):
                node.replace_all_uses_with(node.all_input_nodes[0])
                self._erase(node)
        for node in filter(self._calls_batch_norm, list(graph.nodes)):
            try:
                if node.target not in self.fused:
                    self._fuse(node)
            except _NoTail as reason:
                self.reasons.setdefault(node.target, str(reason))
        self.reasons = {name: reason for name, reason in self.reasons.items() if name not in self.fused}
        for node in [node for node in graph.nodes if node.target is call_tail] if memory_efficient else ():
            self._recompute(node)

    def _layer(self, node):
        """The layer that the node calls with a tensor and no more, or None."""
        is_call = node.op == "call_module" and len(node.args) + len(node.kwargs) == len(node.all_input_nodes) == 1
        return self.layers[node.target] if is_call else None

    def _calls_batch_norm(self, node):
        return node.op == "call_module" and is_batch_norm(self.layers[node.target])

    def _fuse(self, batch_norm):
        """Replace the tail that the batch norm begins; else raises _NoTail."""
        self._check(batch_norm)
        user, add, adds_in_place, residual, residual_norm, residual_first = self._only_user(batch_norm), *[None] * 5
        if operands := _operands(user):
            add, adds_in_place = user, user.target in _IN_PLACE_ADDS
            if adds_in_place and operands[0] is not batch_norm:
                raise _NoTail(f"its output is added in place to {self._label(operands[0])}")
            residual = operands[operands[0] is batch_norm]
            if self._may_wait(residual, add, batch_norm):
                residual_norm, residual = residual, residual.all_input_nodes[0]
                residual_first = batch_norm in _between(residual_norm, add)
            self._check_input(batch_norm, add, residual_norm)
            user = self._only_user(add)
        if not self._is_relu(user):
            fate = "returned" if user.op == "output" else f"used by {self._label(user)}"
            raise _NoTail(f"its output is {fate if add is None else f'added, and the sum {fate}'}")
        inputs = [self._convolved(node) for node in (batch_norm.all_input_nodes[0], residual)]
        with self.graph.inserting_before(add or batch_norm):
            norms = [node and self.graph.get_attr(node.target) for node in (batch_norm, residual_norm)]
            arguments = norms[0], inputs[0], adds_in_place, inputs[1], norms[1], residual_first
            user.replace_all_uses_with(self.graph.call_function(call_tail, arguments))
        self.fused += [node.target for node in (batch_norm, residual_norm) if node]
        for node in filter(None, (user, add, batch_norm, residual_norm)):
            self._erase(node)

    def _erase(self, node):
        self.graph.erase_node(node)
        if node.op == "call_module":
            self.bypassed.add(node.target)

    def _convolved(self, node):
        """The node; in the place of a convolution, whose output nobody else takes, one that leaves out its bias."""
        layer = self._layer(node) if node and len(node.users) == 1 else None
        if type(layer) not in CONVOLUTIONS or layer.bias is None:
            return node
        self.convolved.add(node.target)
        return self._call_in_place_of(node, convolve)

    def _recompute(self, tail):
        """Keep no output of the tail that a convolution or max pooling takes, and nothing else."""
        user = next(iter(tail.users), tail)
        if tail.args[2] is None and len(tail.users) == 1:
            if user.target is convolve:
                user.args = (*user.args, True)
            elif isinstance(self._layer(user), _CONSUMERS):
                self._call_in_place_of(user, call_recomputing)

    def _call_in_place_of(self, node, function):
        with self.graph.inserting_before(node):
            call = self.graph.call_function(function, (self.graph.get_attr(node.target), *node.all_input_nodes))
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        return call

    def _may_wait(self, residual, add, batch_norm):
        """Whether the residual is the output of a batch norm, and of one that may run when the add does."""
        if not self._calls_batch_norm(residual) or len(residual.users) > 1:
            return False
        try:
            self._check(residual)
            self._check_input(residual, add, batch_norm)
        except _NoTail as reason:
            self.reasons[residual.target] = str(reason)
            return False
        return True

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
        if self._layer(batch_norm) is None:
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
        return is_function or is_plain(self._layer(node), nn.ReLU)

    def _check_input(self, batch_norm, add, other_norm):
        """The batch norm is to run when the add does: until then, nobody may change its input."""
        (input,) = batch_norm.all_input_nodes
        is_its_own = isinstance(self._layer(input), nn.modules.conv._ConvNd | nn.Linear) and len(input.users) == 1
        between = [node for node in _between(batch_norm, add) if node is not other_norm]
        if between and not is_its_own:
            raise _NoTail("what runs between it and the add might change its input")
        called = [self.layers[node.target] for node in (batch_norm, *between) if node.op == "call_module"]
        mine, *others = (set(map(id, layer.buffers())) for layer in called)
        if mine & set().union(*others):
            raise _NoTail("what runs between it and the add updates the same statistics")

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


def _between(node, end):
    """The nodes after the one and before the other."""
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 : nodes.index(end)]
