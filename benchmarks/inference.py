"""Inference on a CPU: plain PyTorch, torch.compile, also with freezing, and fused, for inference too.

Beside them ONNX Runtime and OpenVINO, where they are installed (`pip install '.[rivals]'`) and take the type. Models
are cast to the type. The ratios are to plain PyTorch in contiguous tensors; all others run in channels_last. The first
two calls are timed apart: they compile, or watch and pack.
"""

import functools
import importlib.util
import tempfile
import time
import warnings
from pathlib import Path

import torch

from resnet_fused import fuse

from . import harness
from .models import make_model

RIVALS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
INSTALLED = tuple(name for name, package in RIVALS.items() if importlib.util.find_spec(package))
PROVIDERS = ("torch.compile", "torch.compile, freezing", "fused", "fused, inference", *INSTALLED)
FIRST_CALLS = {"first two calls, ms": lambda row: f"{row['first_two_calls_ms']:.1f}"}


def without_gradients(model, images):
    def call():
        with torch.no_grad():  # under inference_mode torch.compile freezes nothing
            return model(images)

    return call


def fused(model, images, **options):
    fuse(model, **options)
    return without_gradients(model, images)


def compiled(model, images, freezing=False):
    def backend(graph, inputs):  # of its own: the two providers would share what is compiled for a forward
        return torch._inductor.compile(graph, inputs)

    call = without_gradients(torch.compile(model, dynamic=False, backend=backend), images)
    with torch._inductor.config.patch(freezing=freezing):
        call()
    return call


def onnx_file(model, images, folder):
    path = Path(folder) / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    return path


def onnx_runtime(model, images):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(onnx_file(model, images, folder), options)
    name, values = session.get_inputs()[0].name, images.contiguous().numpy()
    return lambda: session.run(None, {name: values})


def openvino(model, images):
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        network = openvino.Core().read_model(onnx_file(model, images, folder))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(network, "CPU", settings).create_infer_request()
    values = images.contiguous().numpy()
    return lambda: request.infer([values])


MAKERS = {  # of a provider's call
    "eager": without_gradients,
    "torch.compile": compiled,
    "torch.compile, freezing": functools.partial(compiled, freezing=True),
    "fused": fused,
    "fused, inference": functools.partial(fused, inference=True),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}


def setup(args, name, shape, dtype, first_calls):
    """Each provider, after two calls, whose time is noted by its name and memory format."""
    torch.compiler.reset()
    providers = []
    for provider in ("eager", *args.providers):
        if provider in RIVALS and dtype != "float32":
            continue
        for layout in args.memory_format if provider == "eager" else ["channels_last"]:
            torch.manual_seed(0)
            memory_format = harness.MEMORY_FORMATS[layout]
            model = make_model(name).eval().to(harness.DTYPES[dtype], memory_format=memory_format)
            images = torch.randn(shape, dtype=harness.DTYPES[dtype]).contiguous(memory_format=memory_format)
            start = time.perf_counter()
            call = MAKERS[provider](model, images)
            call(), call()
            first_calls[provider, layout] = (time.perf_counter() - start) * 1e3
            backend = "inductor" if "compile" in provider else RIVALS.get(provider, provider.split(",")[0])
            providers.append(harness.Provider(provider, call, layout, "cpu" if backend == "fused" else backend))
    return providers


def rows_of(args, name, shape, dtype):
    first_calls = {}
    case = harness.Case(
        name, shape, dtype, "inference", functools.partial(setup, args, name, shape, dtype, first_calls)
    )
    rows = harness.run_case(args, case)
    return [row | {"first_two_calls_ms": first_calls[row["provider"], row["memory_format"]]} for row in rows]


def numbers(text):
    return [int(number) for number in text.split(",")]


def main(argv=None):
    from tqdm import tqdm  # see harness.run

    parser = harness.make_parser("inference", __doc__, 1, PROVIDERS)
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 8, 32], metavar="N[,N...]", help="default: 1,8,32")
    parser.add_argument(
        "--sizes", type=numbers, default=[96, 224], metavar="N[,N...]", help="of images; default: 96,224"
    )
    harness.add_models(parser, "resnet18,resnet50,mobilenet_v3_large,timm/efficientnet_b0")
    args = parser.parse_args(argv)
    rows = []
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # torch's word of what is patched here
    with harness.session(args) as machine, torch._inductor.config.patch(force_disable_caches=True):
        cases = [
            (name, (batch, 3, size, size), dtype)
            for name in args.models
            for size in args.sizes
            for batch in args.batch_sizes
            for dtype in args.dtype
        ]
        for case in tqdm(cases, desc=args.bench, disable=None):
            rows += rows_of(args, *case)
    harness.report(args, machine, rows, further_columns=FIRST_CALLS)


if __name__ == "__main__":
    main()
