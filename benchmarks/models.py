"""Models of torchvision and timm: a training step, inference, and the bytes that a step's forward saves for backward.

A frozen step trains all parameters with constant statistics, as fine-tuning does: the batch norms are in eval.

Plain, plain under torch.compile, fused, and fused with memory_efficient. The ratios of all rows are to plain PyTorch in
the first layout.
"""

import functools
import inspect
import itertools

import torch

from resnet_fused import fuse

from . import harness, resnet18
from .saved import saved_bytes

STEPS = "train_step", "frozen_step"
OPTIONS = {"fused": {}, "fused, memory_efficient": {"memory_efficient": True}}  # of fuse, by provider


def make_model(name):
    """torchvision's model of that name, or timm's where it begins with ``timm/``."""
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), num_classes=10)
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    return builder(weights=None, num_classes=10, **backbone)


def make_fused(name, options):
    model = make_model(name)
    fuse(model, example_inputs=torch.randn(2, 3, 64, 64), **options)  # the first call, which is watched
    return model


def models_of(name, providers):
    """Provider -> function that makes its model; those under torch.compile are eager's."""
    fused = {provider: functools.partial(make_fused, name, options) for provider, options in OPTIONS.items()}
    chosen = {provider: make for provider, make in fused.items() if provider in providers}
    return {"eager": functools.partial(make_model, name)} | chosen


def shape_of(args):
    return args.batch_size, 3, args.image_size, args.image_size


def cases(args):
    return [
        harness.Case(
            name,
            shape_of(args),
            dtype,
            phase,
            functools.partial(
                resnet18.setup,
                models_of(name, args.providers),
                args.device,
                args.memory_format,
                shape_of(args),
                dtype,
                phase,
            ),
        )
        for name in args.models
        for dtype in args.dtype
        for phase in (*STEPS, "inference")
    ]


def count_saved(args, name, dtype):
    """A row for each kind of step, provider and layout: what its forward saves."""
    images = torch.randn(shape_of(args), device=args.device, dtype=harness.parameter_dtype(dtype))
    labels = torch.randint(10, images.shape[:1], device=args.device)
    models = models_of(name, args.providers)
    variants = [(provider, layout) for provider in models for layout in args.memory_format]
    if "torch.compile" in args.providers:
        models["torch.compile"] = models["eager"]
        variants.append(("torch.compile", args.memory_format[0]))
    rows = []
    for step, (provider, layout) in itertools.product(STEPS, variants):
        compile = "default" if provider == "torch.compile" else None
        network = resnet18.Network(models[provider], args.device, dtype, layout, compile)
        network.model.train(step == "train_step")
        network.train_step(images, labels)  # compiles without the counting hooks, and is watched by what is fused
        saved = saved_bytes(network.model, images, labels, forward=network.loss)
        eager = next((row["bytes"] for row in rows if row["step"] == step), saved)  # in the first layout
        rows.append(
            {
                "case": name,
                "shape": list(images.shape),
                "dtype": dtype,
                "memory_format": layout,
                "phase": f"saved for backward, {step}",
                "step": step,
                "provider": provider,
                "threads": args.threads[-1],
                "bytes": saved,
                "ratio_to_eager": eager / saved,
            }
        )
    return rows


def mebibytes(row):
    return f"{row['bytes'] / 2**20:.1f} MiB"


def plot(args, machine, rows, saved):
    def label_of(row):
        return mebibytes(row) if "bytes" in row else harness.milliseconds(row)

    harness.plot_ratios(args, machine, rows + saved, label_of)


def main(argv=None):
    from tqdm import tqdm  # see harness.run

    parser = harness.make_parser("models", __doc__, 32, (*OPTIONS, "torch.compile"))
    harness.add_image_size(parser)
    harness.add_models(parser, "resnet18,resnet50,timm/resnet18")
    args = parser.parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
        each = [(name, dtype) for name in args.models for dtype in args.dtype]
        saved = [row for case in tqdm(each, desc="saved", disable=None) for row in count_saved(args, *case)]
    harness.report(
        args,
        machine,
        rows,
        plot=functools.partial(plot, saved=saved),
        further_columns=resnet18.IMAGES_PER_SECOND,
        saved=saved,
    )
    for row in saved:
        case = ", ".join(row[key] for key in ("case", "step", "dtype", "memory_format", "provider"))
        print(f"{case}: {mebibytes(row)} saved, {1 / row['ratio_to_eager']:.1%} of eager's")


if __name__ == "__main__":
    main()
