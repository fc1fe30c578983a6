"""Host time per call, forward and backward, at 8 elements: the operator against eager's three, block against block."""

import functools
import itertools

from . import block, harness, tail


def cases(args):
    shape = (args.batch_size, 2, 2, 2)
    result = []
    for dtype, memory_format in itertools.product(args.dtype, args.memory_format):
        of_tail = functools.partial(tail.setup, args.device, shape, dtype, memory_format, "forward+backward")
        of_block = functools.partial(block.setup, args.device, shape, 2, 1, dtype, memory_format, "train_step")
        result.append(harness.Case("batch_norm_add_relu", shape, dtype, "host_overhead", of_tail))
        result.append(harness.Case("block", shape, dtype, "host_overhead", of_block))
    return result


def main(argv=None):
    args = harness.make_parser("overhead", __doc__, 1, ("fused",)).parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    harness.report(args, machine, rows)


if __name__ == "__main__":
    main()
