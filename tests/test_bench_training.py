import itertools
import json
import multiprocessing
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import cross_entropy

from engm import PGD, data, models
from engm.bench import measuring, profile, reference, tables, training
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError

CPU = torch.device("cpu")
TINY = RunConfig(
    dataset="cifar10", model="small_cnn", width=4, model_norm="batch", batch_size=4, num_steps=2
)
LINF = dict(eps=8 / 255, step_size=2 / 255, num_steps=10)
SMALL = ["--what", "training", "--model", "small_cnn", "--width", 4, "--batch-size", 4]
SMALL += ["--num-steps", 2, "--dataset", "random", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def call(*arguments, code=0):
    words = ["bench", *[str(a) for a in arguments]]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code, result.output
    return result.output


def images(count=24, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return data.Split(pixels, torch.randint(10, (count,), generator=generator))


def batch(count=4, size=32):
    split = images(count, size)
    return split.images.float() / 255, split.labels


def loop(norm="batch", split=None):
    config = replace(TINY, lr=0.1, **LINF)
    return reference.Reference(
        models.build("small_cnn", width=4, norm=norm), split or images(), config
    )


def watch(model):
    """Notes the mode of the model and whether a graph is recorded, at each forward pass."""
    calls = []
    model.register_forward_hook(
        lambda module, args, output: calls.append((module.training, output.requires_grad))
    )
    return calls


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("training")
    rows = "float32,bfloat16 channels_last,engm,engm-input bfloat16,capture"
    few = ["--steps", 2, "--repeats", 3, "--subset", 24, "--methods", rows]
    output = call(*SMALL, *few, "--out", out)
    return out, json.loads((out / "bench.json").read_text()), output


def test_the_command_writes_speeds_beside_the_reference(written):
    out, result, output = written
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert list(result["methods"]) == [
        *("reference", "float32", "bfloat16 channels_last", "engm float32", "engm-input bfloat16"),
        "float32 capture",
    ]
    rows = {name: entry for name, entry in result["methods"].items() if "reason" not in entry}
    reason = result["methods"]["float32 capture"]["reason"]
    assert "CUDA graphs" in reason and f"not able: float32 capture: {reason}" in output
    assert len(rows) == 5
    base = rows["reference"]
    for name, entry in rows.items():
        attack = entry["attack"]
        for found, other, each in ((entry, base, 2), (attack, base["attack"], 1)):
            times = np.array(found["seconds"])
            assert len(times) == 3 and (times > 0).all()
            assert found["median_seconds"] == pytest.approx(np.median(times) / each)
            quartiles = np.quantile(np.array(other["seconds"]) / times, [0.25, 0.5, 0.75])
            assert [found[key] for key in ("low", "ratio", "high")] == pytest.approx(quartiles)
        images_per_second = 4 * 2 / np.median(entry["seconds"])
        assert entry["images_per_second"] == pytest.approx(images_per_second)
        assert entry["epochs_per_hour"] == pytest.approx(images_per_second * 3600 / 50_000)
        # small_cnn of width 4 on 32x32 images, batch 4, 2 steps
        forward = 2 * 4 * 9 * (1024 * 3 * 4 + 256 * 4 * 8 + 64 * 8 * 16) + 2 * 4 * 16 * 10
        passes = 2 * 3 + 1 if name == "reference" else 2 * 2
        assert attack["flops"] == passes * forward
        rate = attack["flops"] / attack["median_seconds"] / 1e12
        assert attack["tflops"] == pytest.approx(rate)
        best = max(result["matrix"]["bfloat16"].values())
        assert attack["fraction"] == pytest.approx(rate / best)
        assert f"\n| {name} | " in output
    assert base["ratio"] == base["low"] == base["high"] == 1
    assert result["environment"]["tf32"] == {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrices": torch.backends.cuda.matmul.allow_tf32,
    }
    assert "data: random images, 24 images; batch size 4" in output
    assert "goal" not in output  # there is one for a GPU alone
    fastest = min(list(rows)[1:], key=lambda name: rows[name]["median_seconds"])
    assert list(result["profile"]) == ["reference", fastest]
    assert tables.table(result) in output  # the file says it all


def test_the_command_in_the_file_is_one_that_the_command_line_takes(written):
    out, result, _ = written
    _, name, *arguments = shlex.split(result["command"])
    context = main.commands[name].make_context(name, arguments)
    assert context.params["what"] == "training"
    assert {name: context.params[name] for name in result["settings"]} == result["settings"]
    assert str(out) not in json.dumps(result)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("training", ["--precision", "float32"]),
        ("training", ["--no-channels-last"]),
        ("training", ["--image-size", "8"]),
        ("step", ["--steps", "3"]),
        ("step", ["--dataset", "random"]),
        ("step", ["--subset", "9"]),
        ("step", ["--data-root", "."]),
    ],
)
def test_options_of_the_other_bench_are_refused(what, arguments, tmp_path):
    output = call("--what", what, *arguments, "--repeats", 1, "--out", tmp_path, code=2)
    flag = arguments[0].replace("--no-", "--")
    assert f"{flag} is not for --what {what}: " in output


def test_bad_names_and_numbers_are_refused_before_anything_is_measured(tmp_path):
    for names in ("float16", "float32 bfloat16", "channels_last channels_last", "float32,"):
        call(*SMALL, "--out", tmp_path, "--methods", names, code=1)
    assert not list(tmp_path.iterdir())
    for wrong in (dict(steps=0), dict(repeats=0), dict(dataset="cifar")):
        with pytest.raises(InputError):
            training.run(TINY, device="cpu", **wrong)


def test_names_are_read_in_any_order_and_written_in_one():
    name = training.row_name("capture engm-input compile bfloat16")
    assert name == "engm-input bfloat16 compile capture"
    assert training.row_name("msgd") == "float32"
    assert [training.row_name(name) for name in training.METHODS[1:]] == list(training.METHODS[1:])


def test_cifar_is_taken_where_it_is_prepared_and_random_images_where_not(tmp_path, monkeypatch):
    found, again = (training.random_images(7, seed=3).train for _ in range(2))
    assert found.images.shape == (7, 3, 32, 32)
    assert torch.equal(found.images, again.images) and torch.equal(found.labels, again.labels)
    config = replace(TINY, subset=16)
    few = dict(data_root=tmp_path, steps=1, repeats=1, names=[], device="cpu")
    assert training.run(config, **few)["settings"]["dataset"] == "random"
    with pytest.raises(InputError, match="CIFAR-10 is not prepared"):
        training.run(config, dataset="cifar10", **few)
    (tmp_path / "cifar10.json").write_text("{}")
    cifar = replace(training.random_images(16, seed=0), title="CIFAR-10")
    monkeypatch.setattr(data, "load", lambda name, root, subset: cifar)
    result = training.run(config, **few)
    assert result["settings"]["dataset"] == "cifar10" and result["data"]["title"] == "CIFAR-10"


def test_methods_take_turns_and_one_that_fails_leaves_with_its_reason():
    methods, failed, order = {name: name for name in ("reference", "float32", "compile")}, {}, []

    def measure(name):
        order.append(name)
        if order.count("float32") == 2 and name == "float32":
            raise RuntimeError("out of memory\nand more")
        return len(order)

    found = measuring.in_turns("", methods, measure, failed, repeats=3)
    rounds = ["reference", "float32", "compile"]
    assert order == rounds + rounds + ["reference", "compile"]
    assert found == {"reference": [1, 4, 7], "compile": [3, 6, 8]}
    assert list(methods) == ["reference", "compile"]
    assert failed == {"float32": {"reason": "RuntimeError: out of memory"}}


@pytest.mark.parametrize("names", [["reference", "capture"], ["bfloat16", "reference"]])
def test_the_first_has_to_be_able_and_a_capture_that_fails_ends_the_bench(names):
    def build(name):
        if name == "capture":
            raise InputError("the attack cannot be recorded: not permitted; leave capture out")
        if name == "bfloat16":
            raise InputError("no")

    with pytest.raises(InputError):
        measuring.in_turns("", {name: name for name in names}, build, {})


def test_what_was_measured_is_kept_where_a_profile_ends_the_process(monkeypatch, tmp_path):
    def end(*_):
        raise SystemExit(139)

    monkeypatch.setattr(training, "profile", end)
    few = ["--steps", 1, "--repeats", 1, "--subset", 16, "--methods", "float32"]
    call(*SMALL, *few, "--out", tmp_path, code=139)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["profile"] == {}
    assert "| float32 | " in tables.table(result)


def test_with_compiled_rows_torch_fails_where_it_would_stop_compiling():
    from torch._dynamo import config

    before = config.recompile_limit
    with training.compiling(["reference", "float32 compile"]):
        assert config.recompile_limit > before
        assert config.fail_on_recompile_limit_hit
    assert config.recompile_limit == before and not config.fail_on_recompile_limit_hit


# The reference's step


def test_a_step_of_the_reference_has_thirteen_forward_passes_in_train_mode_with_graphs():
    runner = loop()
    calls = watch(runner.model)
    runner.step(*batch())
    # ten attack steps, the comparison of losses, the outer step, the clean images
    assert calls == [(True, True)] * 13


def test_the_attack_of_the_reference_takes_gradients_of_weights_and_moves_statistics():
    model = models.build("small_cnn", width=4, norm="batch").train()
    conv, norm = model.conv1.weight, model.norm1.running_mean
    gradients, statistics, passes = [], [norm.clone()], []
    conv.register_hook(lambda gradient: gradients.append(gradient.norm()))
    model.register_forward_hook(lambda *_: statistics.append(norm.clone()))
    model.register_full_backward_hook(lambda *_: passes.append(1))
    weights = [p.detach().clone() for p in model.parameters()]
    reference.attack(model, *batch(), **LINF)
    assert len(gradients) == 10 and all(gradients)
    assert len(passes) == 10
    assert len(statistics) == 1 + 11
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(statistics))
    assert model.conv1.weight.grad is not None  # they gather until the outer step
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("num_steps", [1, 10])
def test_the_attack_of_the_reference_is_linf_pgd(num_steps):
    # without norm layers train and eval mode are one, and PGD draws the same start
    model = models.build("small_cnn", width=4, norm="none").double()
    x, y = batch()
    x = x.double()
    settings = LINF | {"num_steps": num_steps}
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    try:
        found = x + reference.attack(model, x, y, **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(5)
    expected = PGD(**settings)(model, x, y)
    # the sign of a gradient of almost 0 may turn
    assert ((found - expected).abs() < 1e-12).double().mean() > 0.999
    assert (found - x).abs().max() == pytest.approx(8 / 255)
    assert found.min() >= 0 and found.max() <= 1


def test_the_outer_step_of_the_reference_is_sgd_on_the_adversarial_images():
    x, y = batch()
    runner = loop("none")
    runner._attack = lambda *_: torch.full_like(x, 0.5)
    copied = models.build("small_cnn", width=4, norm="none")
    copied.load_state_dict(runner.model.state_dict())
    velocities = [torch.zeros_like(p) for p in copied.parameters()]
    for _ in range(3):
        logits = copied((x + 0.5).clamp(max=1))
        loss = cross_entropy(logits, y)
        gradients = torch.autograd.grad(loss, list(copied.parameters()))
        before = np.array(runner.sums)
        runner.step(x, y)
        with torch.no_grad():
            for p, v, g in zip(copied.parameters(), velocities, gradients, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(0.1 * v)
        torch.testing.assert_close(list(runner.model.parameters()), list(copied.parameters()))
        clean = copied(x)  # after the step
        expected = [4 * loss.item(), int((logits.argmax(1) == y).sum())]
        expected += [4 * cross_entropy(clean, y).item(), int((clean.argmax(1) == y).sum())]
        assert runner.sums - before == pytest.approx(expected, rel=1e-4)


def test_the_items_of_the_reference_are_crops_of_reflected_images():
    split = images(150, size=16)
    crops = reference.Crops(split, seed=0)
    chosen = []
    for index in range(150):
        image, label = crops[index]
        assert (image.dtype, image.shape) == (np.float64, (3, 16, 16))
        assert label == split.labels[index]
        np.testing.assert_array_equal(image, crops[index][0])
        padded = np.pad(split.images[index].numpy(), [(0, 0), (4, 4), (4, 4)], mode="reflect")
        places = [
            (top, left, mirror)
            for top, left, mirror in itertools.product(range(9), range(9), (1, -1))
            if np.array_equal(
                padded[:, top : top + 16, left : left + 16][:, :, ::mirror] / 255, image
            )
        ]
        assert len(places) == 1
        chosen += places
    tops, lefts, mirrors = map(set, zip(*chosen, strict=True))
    assert tops == lefts == set(range(9)) and mirrors == {1, -1}


def test_the_batches_of_the_reference_are_whole_shuffled_and_come_from_two_workers():
    before = {*multiprocessing.active_children()}
    runner = loop(split=images(22))
    workers = {*multiprocessing.active_children()} - before
    seen = [runner.batch]
    runner.step = lambda x, y: seen.append((x, y))
    runner.train(10)
    assert len(workers) == 2 and workers == {*multiprocessing.active_children()} - before
    assert all(x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 for x, _ in seen)
    assert all(y.dtype == torch.int64 for _, y in seen)
    pixels = torch.cat([x for x, _ in seen]).flatten(1)
    items = [torch.from_numpy(image).float().flatten() for image, _ in runner.crops]
    drawn = [int(torch.stack([(row == item).all() for item in items]).nonzero()) for row in pixels]
    assert sorted(drawn[:22]) == sorted(drawn[22:]) == list(range(22))
    assert drawn[:22] != drawn[22:] and drawn[:22] != list(range(22))
    del runner
    assert {*multiprocessing.active_children()} == before


def test_the_reference_reads_four_numbers_a_step():
    runner, (x, y) = loop(), batch()
    found = profile.profile(lambda steps: [runner.step(x, y) for _ in range(steps)], 2, CPU, 1)
    assert found["waits"] == 4


# The kit's step


@pytest.mark.filterwarnings("ignore:at step")  # a few random images hardly fit a line
@pytest.mark.parametrize("name", ["float32", "bfloat16 channels_last", "engm", "engm-input"])
def test_a_step_of_the_kit_has_ten_forward_passes_in_eval_mode_and_one_in_train_mode(name):
    config = replace(TINY, num_steps=10)
    model = models.build("small_cnn", width=4, norm="batch")
    runner = training.Kit(model, training.random_images(24, 0), config, name)
    model, calls = runner.trainer.model, watch(runner.trainer.model)
    before, statistics = model.conv1.weight.detach().clone(), model.norm1.running_mean.clone()
    runner.attack()
    assert [in_train_mode for in_train_mode, _ in calls] == [False] * 10
    assert torch.equal(model.norm1.running_mean, statistics)
    calls.clear()
    runner.train(3)
    assert [in_train_mode for in_train_mode, _ in calls] == 3 * ([False] * 10 + [True])
    assert not torch.equal(model.conv1.weight, before)


def test_the_kit_trains_on_whole_augmented_batches_as_engm_train_does(monkeypatch):
    images_of = training.random_images(22, 0)
    runner = training.Kit(
        models.build("small_cnn", width=4), images_of, TINY, "engm-input bfloat16"
    )
    assert type(runner.trainer.optimizer.measure).__name__ == "ProxyMeasure"
    assert runner.trainer.precision.dtype == torch.bfloat16
    assert runner.trainer.attacked is None  # on the CPU, without compile
    given = []
    monkeypatch.setattr(runner.trainer, "train_on", given.extend)
    runner.train(7)
    assert [len(y) for _, y in given] == [4] * 7  # 5 an epoch, and no smaller one
    how = dict(seed=0, augment=True, drop_last=True)
    epochs = [data.batches(images_of.train, 4, epoch=epoch, **how) for epoch in (1, 2)]
    expected = list(itertools.chain(*epochs))[1:8]  # the first is attacked alone
    assert all(torch.equal(x, wanted) for (x, _), (wanted, _) in zip(given, expected, strict=True))
    compiled = training.Kit(models.build("small_cnn", width=4), images_of, TINY, "compile")
    assert type(compiled.trainer.attacked).__name__ == "AttackedModel"


# Rates and profile


def test_operations_are_those_of_a_closed_form():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 7))
    x, y = batch(count=4, size=8)
    y = y % 7
    forward = 2 * 4 * (8 * 8 * 5 * 3 * 9 + 320 * 7)
    assert measuring.flops(lambda: model(x)) == forward
    # the kit: each step forward, and back to the pixels
    assert measuring.flops(lambda: PGD(**LINF)(model, x, y)) == 10 * 2 * forward
    # the reference: back to the weights too, and a last pass forward
    attack = measuring.flops(lambda: reference.attack(model, x, y, **LINF))
    assert attack == 10 * 3 * forward + forward
    with torch.autocast("cpu", torch.bfloat16):
        assert measuring.flops(lambda: model(x)) == forward


def test_the_rate_of_matrices_is_operations_over_the_least_time(monkeypatch):
    class Timer:
        def __init__(self, statement, globals, num_threads):
            assert num_threads == torch.get_num_threads()
            exec(statement, globals)
            left, right = globals["work"].args
            product = globals["work"].keywords["out"]
            torch.testing.assert_close(product, left @ right)
            seen.append((product.dtype, product.shape))

        def blocked_autorange(self, min_run_time):
            return SimpleNamespace(times=[0.3, 0.1, 0.2])

    seen = []
    monkeypatch.setattr(measuring, "Timer", Timer)
    monkeypatch.setattr(measuring, "SIZES", {"cpu": (8, 16)})
    rates = measuring.matrix_rates(CPU)
    assert rates["bfloat16"] == pytest.approx({"8": 2 * 8**3 / 1e11, "16": 2 * 16**3 / 1e11})
    assert list(rates) == ["bfloat16", "float32"]
    assert seen == [(t, (s, s)) for t in (torch.bfloat16, torch.float32) for s in (8, 16)]


KERNELS = {
    "convolution, matrix": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, true>",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::Copy_Atom",
        "triton_tem_fused_convolution_0",
        *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::addmm", "aten::mm"),
    ],
    "normalisation": [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<>",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16>",
        "triton_poi_fused__native_batch_norm_legit_no_training_convolution_relu_3",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>",
        *("aten::native_batch_norm", "aten::native_group_norm_backward"),
    ],
    "elementwise, rest": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>",
        "triton_poi_fused_convolution_backward_threshold_backward_5",
        *("aten::add", "aten::relu", "aten::comment"),
    ],
    "copies": [
        *("Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "aten::copy_"),
        "void cudnn::engines_precompiled::nchwToNhwcKernel<float, float, float, false>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
        "at::native::(anonymous namespace)::TensorListMetadata<2>, BinaryOpListAlpha",
        "Optimizer.step#MSGD.step",
    ],
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_and_operators_are_sorted_by_their_names(kind):
    assert {name: profile.kind_of(name) for name in KERNELS[kind]} == dict.fromkeys(
        KERNELS[kind], kind
    )


def test_the_profile_of_a_known_work():
    layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    x = torch.rand(8, 8, 16, 16)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = layers(x).square().mean()
            loss.backward()
            optimizer.step()
            assert [loss.item(), loss.item(), loss.item()]

    train(1)
    found = profile.profile(train, 4, CPU, seconds_per_step=1e9)
    assert found["waits"] == 3
    kinds = found["kinds"]
    assert list(kinds) == list(profile.KINDS)
    assert min(kinds[kind] for kind in profile.KINDS if kind != "copies") > 0
    assert sum(kinds.values()) + found["idle"] == pytest.approx(found["wall"])
    assert found["wall"] < 1
    assert found["data"] == 0


def test_what_an_optimizer_calls_is_the_optimizers():
    weight = nn.Parameter(torch.rand(1_000_000))
    weight.grad = torch.rand(1_000_000)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    found = profile.profile(lambda steps: [optimizer.step() for _ in range(steps)], 3, CPU, 1)
    assert found["kinds"]["optimizer"] == pytest.approx(sum(found["kinds"].values()))


def test_on_cuda_the_kinds_are_times_of_kernels(monkeypatch):
    from torch.autograd import DeviceType

    def event(name, microseconds, device=DeviceType.CUDA, span=False):
        time = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(
            name=name, time_range=time, device_type=device, is_user_annotation=span
        )

    host = DeviceType.CPU
    events = [
        *(event("sm90_xmma_fprop", 100), event("bn_fw_tr", 50), event("Memcpy DtoH", 10)),
        *(event("my span", 1000, span=True), event("Optimizer.step#SGD.step", 900)),
        *(event("cudaStreamSynchronize", 400, host), event("cudaStreamSynchronize", 1, host)),
        event("aten::_local_scalar_dense", 1, host),
        event("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 70, host),
    ]

    class Recorded:
        def __init__(self, activities):
            assert len(activities) == 2

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Recorded)
    monkeypatch.setattr(profile, "seconds", lambda work, device, wall: 800e-6)
    found = profile.profile(lambda steps: None, 2, torch.device("cuda"), seconds_per_step=100e-6)
    assert found["wall"] == 100e-6
    assert found["idle"] == pytest.approx(20e-6)
    assert found["kinds"] == pytest.approx(
        {"convolution, matrix": 50e-6, "normalisation": 25e-6, "copies": 5e-6}
        | {"elementwise, rest": 0, "optimizer": 0}
    )
    assert (found["waits"], found["data"]) == (1, pytest.approx(35e-6))


def result_of(ratio, fraction, cuda="13.0"):
    def row(ratio, fraction):
        attack = dict(median_seconds=0.02, flops=4e12, tflops=200.0, fraction=fraction)
        attack["seconds"] = [0.095, 0.1, 0.105]  # quartiles 0.0975 and 0.1025
        return dict(
            median_seconds=0.025, images_per_second=5120.4, epochs_per_hour=368.64, ratio=ratio,
            low=ratio - 0.5, high=ratio + 0.25, attack=attack,
        )  # fmt: skip

    kinds = dict.fromkeys(profile.KINDS, 0.004)
    rows = {"reference": row(1.0, 0.1), "bfloat16": row(ratio, fraction), "float32": row(2.0, None)}
    return {
        "what": "training",
        "methods": {**rows, "engm bfloat16": row(50.0, 0.9), "bfloat16 compile": {"reason": "no"}},
        "matrix": {"bfloat16": {"4096": 600.0, "8192": 700.0}, "float32": {"4096": 50.0}},
        "profile": {
            "reference": dict(kinds=kinds, idle=0.005, wall=0.025, data=0.001, waits=8.0),
            "bfloat16": {"reason": "RuntimeError: CUPTI"},
        },
        "environment": {"cuda": cuda, "tf32": {"convolutions": True, "matrices": False}},
        "data": {"title": "CIFAR-10", "images": 49_000},
        "settings": {"batch_size": 128, "num_steps": 10},
    }


def test_the_table_says_what_could_not_be_measured_and_has_goals_for_a_gpu_alone():
    # what else it says is held to the committed logs
    text = tables.table(result_of(6.5, 0.349))
    row = "| bfloat16 | 25.0 ms | 5120 | 368.6 | 6.50 (6.00 to 6.75) | 20.0 ms | 200 | 34.9% |\n"
    assert row in text
    assert "not able: bfloat16 compile: no" in text
    assert text.endswith("not able: profile of bfloat16: RuntimeError: CUPTI")
    assert "goal" not in tables.table(result_of(9.0, 0.5, cuda=None))


@pytest.mark.parametrize(
    ("ratio", "fraction", "speed", "rate"),
    [
        (6.5, 0.359, "reached (6.50 x)", "reached (35.9%)"),
        (6.49, 0.358, "not settled (6.49 x, quartiles 5.99 x to 6.74 x)",
         "not settled (35.8%, quartiles 34.9% to 36.7%)"),
        (5.75, 0.342, "not settled (5.75 x, quartiles 5.25 x to 6.00 x)",
         "not settled (34.2%, quartiles 33.4% to 35.1%)"),
        (5.74, 0.341, "NOT reached (5.74 x)", "NOT reached (34.1%)"),
    ],
)  # fmt: skip
def test_a_goal_is_settled_where_both_quartiles_agree(ratio, fraction, speed, rate):
    text = tables.table(result_of(ratio, fraction))
    assert f"\nthe kit's goal, 6 x the reference's epochs an hour, bfloat16: {speed}\n" in text
    assert f"\nthe kit's goal, attack steps at 35% of the bf16 rate, bfloat16: {rate}\n" in text


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [
        ((1.0, 0.9, 1.01), "reached (1.000)"),
        ((1.0, 0.9, 1.011), "not settled (1.000, quartiles 0.900 to 1.011)"),
        ((1.02, 1.01, 1.03), "not settled (1.020, quartiles 1.010 to 1.030)"),
        ((1.02, 1.011, 1.03), "NOT reached (1.020)"),
    ],
)
def test_a_cost_is_held_to_its_goal_by_both_quartiles(spread, verdict):
    costs = dict(zip(("ratio", "low", "high"), spread, strict=True), median_seconds=1, peak_ratio=1)
    entry = {"agrees": True, "outer": costs, "at": costs}
    text = tables.table({"methods": {"output": entry}, "settings": {"num_steps": 10}})
    assert text.endswith(f"the kit's goal, AT-10 step with output at most 1.01: {verdict}")
