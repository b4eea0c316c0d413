import itertools
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import cross_entropy

import engm.training
from engm import PGD, data, models
from engm.bench import costs, kit, profile, rates, reference, speeds, training
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError

CPU = torch.device("cpu")
TINY = RunConfig(
    dataset="cifar10", model="small_cnn", width=4, model_norm="batch", batch_size=4, num_steps=2
)
LINF = dict(eps=8 / 255, step_size=2 / 255, num_steps=10)


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


def loop(model, split=None, batch_size=4, **settings):
    how = dict(batch_size=batch_size, lr=0.1, epochs=8, seed=0, attack=LINF) | settings
    return reference.Reference(model, split or images(), **how)


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
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--num-steps", 2]
    few = ["--steps", 2, "--repeats", 3, "--dataset", "random", "--subset", 24, "--device", "cpu"]
    rows = "float32,bfloat16 channels_last,engm,engm-input bfloat16,capture"
    output = call("--what", "training", *small, *few, "--methods", rows, "--out", out)
    return out, json.loads((out / "bench.json").read_text()), output


def test_the_command_writes_speeds_beside_the_reference(written):
    out, result, output = written
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert result["what"] == "training"
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
        for found, other, each in ((entry, base, 2), (entry["attack"], base["attack"], 1)):
            times = np.array(found["seconds"])
            assert len(times) == 3 and (times > 0).all()
            assert found["median_seconds"] == pytest.approx(np.median(times) / each)
            speeds_of_rounds = np.array(other["seconds"]) / times
            low, middle, high = np.quantile(speeds_of_rounds, [0.25, 0.5, 0.75])
            assert (found["low"], found["ratio"], found["high"]) == pytest.approx(
                (low, middle, high)
            )
        images_per_second = 4 * 2 / np.median(entry["seconds"])
        assert entry["images_per_second"] == pytest.approx(images_per_second)
        assert entry["epochs_per_hour"] == pytest.approx(images_per_second * 3600 / 50_000)
        assert entry["peak_bytes"] is entry["reserved_bytes"] is None
        attack = entry["attack"]
        rate = attack["flops"] / attack["median_seconds"] / 1e12
        assert attack["tflops"] == pytest.approx(rate)
        best = max(result["matrix"]["bfloat16"].values())
        assert attack["fraction"] == pytest.approx(rate / best)
        assert f"| {name} | " in output
    assert base["ratio"] == base["low"] == base["high"] == 1
    assert result["environment"]["tf32"] == {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrices": torch.backends.cuda.matmul.allow_tf32,
    }
    assert "data: random images, 24 images; batch size 4" in output
    assert "goal" not in output  # there is one for a GPU alone
    fastest = max(list(rows)[1:], key=lambda name: rows[name]["ratio"])
    assert list(result["profile"]) == ["reference", fastest]


def test_the_table_comes_from_the_file_alone_and_other_logs_have_theirs(written):
    _, result, output = written
    assert costs.table(result) in output
    without = {k: v for k, v in result.items() if k != "what"}
    with pytest.raises(KeyError):
        costs.table(without)  # that of steps


def test_the_command_in_the_file_is_one_that_the_command_line_takes(written):
    out, result, _ = written
    engm, name, *arguments = shlex.split(result["command"])
    context = main.commands[name].make_context(name, arguments)
    assert (engm, context.params["what"]) == ("engm", "training")
    settings = result["settings"]
    assert {name: context.params[name] for name in settings} == settings
    assert str(out) not in json.dumps(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--what", "training", "--precision", "float32"],
            "--precision is not for --what training",
        ),
        (
            ["--what", "training", "--no-channels-last"],
            "--channels-last is not for --what training",
        ),
        (["--what", "training", "--image-size", "8"], "--image-size is not for --what training"),
        (["--steps", "3"], "--steps is not for --what step: a round is one step"),
        (["--dataset", "random"], "--dataset is not for --what step: its images are random"),
        (["--subset", "9"], "--subset is not for --what step"),
        (["--data-root", "."], "--data-root is not for --what step"),
    ],
)
def test_options_of_the_other_bench_are_refused(arguments, message, tmp_path):
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--device", "cpu"]
    few = ["--repeats", 1, "--methods", "msgd", "--out", tmp_path]
    assert message in call(*small, *few, *arguments, code=2)


def test_bad_names_and_numbers_are_refused_before_anything_is_measured(tmp_path):
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--dataset", "random"]
    quick = ["--what", "training", *small, "--out", tmp_path, "--device", "cpu", "--methods"]
    assert "unknown method 'float16'; name 'reference', or" in call(*quick, "float16", code=1)
    assert "says its precision twice" in call(*quick, "float32 bfloat16", code=1)
    assert "says its channels last twice" in call(*quick, "channels_last channels_last", code=1)
    assert "a method has no name" in call(*quick, "float32,", code=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="steps must be a whole number, 1 or more; got 0"):
        training.run(TINY, steps=0, device="cpu")
    with pytest.raises(InputError, match="unknown dataset 'cifar'; choose from cifar10, random"):
        training.run(TINY, dataset="cifar", device="cpu")
    small = RunConfig(**TINY.to_dict() | {"subset": 15})
    with pytest.raises(InputError, match="an epoch has 3 whole batches, .* and 3 are wanted"):
        training.run(small, dataset="random", names=[], device="cpu")


def test_names_are_read_in_any_order_and_written_in_one():
    variant = kit.Variant.parse("capture engm-input compile bfloat16")
    assert variant == kit.Variant("engm-input", "bfloat16", compile=True, capture=True)
    assert variant.name == "engm-input bfloat16 compile capture"
    assert kit.Variant.parse("msgd").name == "float32"
    for name in training.METHODS[1:]:
        assert kit.Variant.parse(name).name == name


def test_cifar_is_taken_where_it_is_prepared_and_random_images_where_not(tmp_path, monkeypatch):
    found = training._images(None, tmp_path, 7, seed=3)
    again = training._images("random", tmp_path, 7, seed=3)
    assert (found.name, len(found.train), found.train.images.shape[1:]) == (
        "random",
        7,
        (3, 32, 32),
    )
    assert torch.equal(found.train.images, again.train.images)
    assert len(training._images("random", tmp_path, None, seed=0).train) == 50_000
    with pytest.raises(InputError, match="CIFAR-10 is not prepared"):
        training._images("cifar10", tmp_path, 7, seed=3)
    (tmp_path / "cifar10.json").write_text("{}")
    monkeypatch.setattr(data, "load", lambda name, root, subset: (name, root, subset))
    assert training._images(None, tmp_path, 7, seed=3) == ("cifar10", tmp_path, 7)


def test_methods_take_turns_and_one_that_fails_leaves_with_its_reason(monkeypatch):
    order = []

    class Runner:
        def __init__(self, name):
            self.name = name

        def prepare(self, steps):
            order.append(("prepare", self.name))

        def train(self, steps):
            if len(order) > 7 and self.name == "float32":
                raise RuntimeError("out of memory\nand more")
            order.append((steps, self.name))

        def attack(self):
            order.append(("attack", self.name))

    monkeypatch.setattr(rates, "SIZES", {"cpu": (8,)})
    bench = training._Bench(
        TINY.resolved(), training._images("random", None, 8, 0), CPU, steps=8, repeats=2
    )
    names = ("reference", "float32", "bfloat16")
    bench.runners = {name: Runner(name) for name in names}
    times = bench.rounds("", bench.train)
    first = [(what, name) for name in names for what in ("prepare", 8)]
    assert order[:6] == first
    assert order[6:] == [(what, n) for n in names for what in ("prepare", 8) if (what, n) != (8, "float32")]  # fmt: skip  # noqa: E501
    assert bench.found["float32"] == {"reason": "RuntimeError: out of memory"}
    assert list(bench.runners) == ["reference", "bfloat16"]
    assert [len(times[name]) for name in names] == [2, 1, 2]
    order.clear()
    bench.attack(bench.runners["bfloat16"], 3)
    assert order == [("attack", "bfloat16")] * 3


def test_what_was_measured_is_kept_where_a_profile_ends_the_process(monkeypatch, tmp_path):
    def end(*_):
        raise SystemExit(139)

    monkeypatch.setattr(training, "profile", end)
    monkeypatch.setattr(rates, "SIZES", {"cpu": (8,)})
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--num-steps", 1]
    few = ["--steps", 1, "--repeats", 1, "--dataset", "random", "--subset", 16, "--device", "cpu"]
    how = ["--methods", "float32", "--out", tmp_path]
    call("--what", "training", *small, *few, *how, code=139)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["profile"] == {}
    assert "| float32 | " in costs.table(result)


def test_a_capture_that_fails_ends_the_bench(monkeypatch):
    def build(self, name):
        if "capture" in name:
            raise InputError("the attack cannot be recorded: not permitted; leave capture out")
        return kit.Kit(self.model, self.split, self.config, kit.Variant())

    monkeypatch.setattr(training._Bench, "build", build)
    images_of = training._images("random", None, 8, 0)
    bench = training._Bench(TINY.resolved(), images_of, CPU, steps=1, repeats=1)
    bench.warm_up("float32")
    with pytest.raises(InputError, match="name --methods without capture"):
        bench.warm_up("float32 capture")
    assert list(bench.runners) == ["float32"]


def test_with_compiled_rows_torch_fails_where_it_would_stop_compiling():
    from torch._dynamo import config

    before = config.recompile_limit
    with kit.as_named(["reference", "compile"]):
        assert config.recompile_limit > before
        assert config.fail_on_recompile_limit_hit
    assert config.recompile_limit == before and not config.fail_on_recompile_limit_hit


# The reference's step


def test_a_step_of_the_reference_has_thirteen_forward_passes_in_train_mode_with_graphs():
    model = models.build("small_cnn", width=4, norm="batch")
    calls = watch(model)
    loop(model).step(*batch())
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


def test_the_outer_step_of_the_reference_is_sgd_on_the_adversarial_images(monkeypatch):
    model = models.build("small_cnn", width=4, norm="none")
    x, y = batch()
    shift = torch.full_like(x, 0.5)
    monkeypatch.setattr(reference, "attack", lambda *_, **__: shift)
    runner = loop(model)
    runner.epoch, start = 1, [p.detach().clone() for p in model.parameters()]
    copied = models.build("small_cnn", width=4, norm="none")
    copied.load_state_dict(model.state_dict())
    velocities = [torch.zeros_like(p) for p in start]
    for lr in (0.1, 0.01, 0.001):  # before a half, before three quarters, after
        runner.epoch, runner.done = {0.1: 1, 0.01: 5, 0.001: 7}[lr], 0
        logits = copied((x + 0.5).clamp(max=1))
        loss = cross_entropy(logits, y)
        gradients = torch.autograd.grad(loss, list(copied.parameters()))
        before = list(runner.sums)
        runner.step(x, y)
        with torch.no_grad():
            for p, v, g in zip(copied.parameters(), velocities, gradients, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * v)
        torch.testing.assert_close(list(model.parameters()), list(copied.parameters()))
        gained = [after - sum_ for after, sum_ in zip(runner.sums, before, strict=True)]
        clean = copied(x)  # after the step
        expected = [4 * loss.item(), int((logits.argmax(1) == y).sum())]
        expected += [4 * cross_entropy(clean, y).item(), int((clean.argmax(1) == y).sum())]
        assert gained == pytest.approx(expected, rel=1e-4)


def test_the_items_of_the_reference_are_crops_of_reflected_images_drawn_once_an_epoch():
    split = images(6, size=16)
    crops = reference.Crops(split, seed=0)
    chosen = []
    for epoch in range(30):
        if epoch:
            crops.draw()
        for index in range(6):
            image, label = crops[index]
            assert (image.dtype, image.shape) == (np.float64, (3, 16, 16))
            assert label == split.labels[index]
            np.testing.assert_array_equal(image, crops[index][0])  # until the next epoch
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
    runner = loop(models.build("small_cnn", width=4, norm="batch"), images(22))
    assert runner.loader.num_workers == 2 and runner.whole == 5
    seen = []
    runner.step = lambda x, y: seen.append((x, y))
    runner.train(4)
    workers = [w.pid for w in runner._batches._workers]
    first, choices = runner._batches, runner.crops.top.copy()
    assert len(workers) == 2
    assert all(x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 for x, _ in seen)
    assert all(y.dtype == torch.int64 for _, y in seen)
    runner.prepare(1)  # nothing is left: 5 batches, the first to start with
    assert (runner.epoch, runner.done) == (2, 1)
    assert runner._batches is not first
    assert not np.array_equal(runner.crops.top, choices)
    labels = torch.cat([y for _, y in seen])
    assert not torch.equal(labels, images(22).labels[4:20])
    runner.prepare(4)
    assert runner.epoch == 2
    with pytest.raises(InputError, match="5 whole batches"):
        runner.prepare(5)
    runner.close()


def test_the_reference_reads_four_numbers_a_step(monkeypatch):
    runner = loop(models.build("small_cnn", width=4, norm="batch"))
    x, y = batch()

    def train(steps):
        for _ in range(steps):
            runner.step(x, y)

    found = profile.profile(train, 2, CPU)
    assert found["waits"] == 4


# The kit's step


@pytest.mark.filterwarnings("ignore:at step")  # a few random images hardly fit a line
@pytest.mark.parametrize("name", ["float32", "bfloat16 channels_last", "engm", "engm-input"])
def test_a_step_of_the_kit_has_ten_forward_passes_in_eval_mode_and_one_in_train_mode(name):
    config = RunConfig(**TINY.to_dict() | {"num_steps": 10}).resolved()
    runner = kit.Kit(
        models.build("small_cnn", width=4, norm="batch"), images(), config, kit.Variant.parse(name)
    )
    calls = watch(runner.trainer.model)
    before = runner.trainer.model.conv1.weight.detach().clone()
    statistics = runner.trainer.model.norm1.running_mean.clone()
    runner.attack()
    assert [training for training, _ in calls] == [False] * 10
    assert torch.equal(runner.trainer.model.norm1.running_mean, statistics)
    calls.clear()
    runner.train(3)
    assert [training for training, _ in calls] == 3 * ([False] * 10 + [True])
    assert not torch.equal(runner.trainer.model.conv1.weight, before)


def test_the_kit_trains_as_engm_train_does(monkeypatch):
    config = TINY.resolved()
    given = {}

    def epoch(model, method, optimizer, examples, **rest):
        shown = torch.backends.cudnn.benchmark
        given.update(rest, optimizer=optimizer, examples=list(examples), benchmark=shown)

    monkeypatch.setattr(engm.training, "train_one_epoch", epoch)
    variant = kit.Variant.parse("engm-input bfloat16 channels_last")
    runner = kit.Kit(models.build("small_cnn", width=4), images(22), config, variant)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    runner.train(7)
    assert given["benchmark"] and not torch.backends.cudnn.benchmark
    assert given["precision"].dtype == torch.bfloat16
    assert given["precision"].memory_format == torch.channels_last
    assert type(given["optimizer"].measure).__name__ == "InputMeasure"
    assert [len(y) for _, y in given["examples"]] == [4] * 7  # 5 an epoch, and no smaller one
    epochs = [data.batches(images(22), 4, seed=0, epoch=k, augment=True, drop_last=True) for k in (1, 2)]  # fmt: skip  # noqa: E501
    for (x, _), (expected, _) in zip(given["examples"], itertools.chain(*epochs), strict=False):
        assert torch.equal(x, expected)
    assert runner.trainer.attacked is None  # on the CPU, without compile
    compiled = kit.Kit(models.build("small_cnn", width=4), images(22), config, kit.Variant(compile=True))  # fmt: skip  # noqa: E501
    assert type(compiled.trainer.attacked).__name__ == "AttackedModel"


# Rates and profile


def test_operations_are_those_of_a_closed_form():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 7))
    x, y = batch(count=4, size=8)
    y = y % 7
    forward = 2 * 4 * (8 * 8 * 5 * 3 * 9 + 320 * 7)
    assert rates.flops(lambda: model(x)) == forward
    # the kit: each step forward, and back to the pixels
    assert rates.flops(lambda: PGD(**LINF)(model, x, y)) == 10 * 2 * forward
    # the reference: back to the weights too, and a last pass forward
    attack = rates.flops(lambda: reference.attack(model, x, y, **LINF))
    assert attack == 10 * 3 * forward + forward
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with half():
        assert rates.flops(lambda: model(x)) == forward


def test_the_operations_in_the_file_are_those_of_the_attacks(written):
    result = written[1]
    # small_cnn of width 4 on 32x32 images, batch 4, 2 steps
    forward = 2 * 4 * 9 * (1024 * 3 * 4 + 256 * 4 * 8 + 64 * 8 * 16) + 2 * 4 * 16 * 10
    for name, entry in result["methods"].items():
        passes = 2 * 3 + 1 if name == "reference" else 2 * 2
        if "attack" in entry:
            assert entry["attack"]["flops"] == passes * forward


def test_the_rate_of_matrices_is_operations_over_the_least_time(monkeypatch):
    products, clock = [], iter(range(1, 100))

    def seconds(work, device, *, wall):
        assert wall
        products.clear()
        work()
        return next(clock) / 100  # the first calibrates: 10 products a sample

    monkeypatch.setattr(rates, "seconds", seconds)
    monkeypatch.setattr(rates, "_multiply", lambda *matrices: products.append(matrices[0]))
    assert rates._best(CPU, torch.bfloat16, 16) == pytest.approx(2 * 16**3 * 30 / 0.02 / 1e12)
    assert len(products) == 30
    assert products[0].dtype == torch.bfloat16 and products[0].shape == (16, 16)
    monkeypatch.undo()
    found = rates.matrix_rates(CPU, sizes=(8, 16))
    assert list(found) == ["bfloat16", "float32"]
    assert all(list(by_size) == ["8", "16"] for by_size in found.values())
    left = torch.randn(3, 3)
    rates._multiply(left, left, product := torch.empty(3, 3))
    torch.testing.assert_close(product, left @ left)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "convolution, matrix",
            [
                "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128",
                "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>",
                "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
                "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, true>",
                "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
                "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::Copy_Atom",
                "triton_tem_fused_convolution_0",
                *(
                    "aten::mkldnn_convolution",
                    "aten::convolution_backward",
                    "aten::addmm",
                    "aten::mm",
                ),
            ],
        ),
        (
            "normalisation",
            [
                "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
                "void at::native::batch_norm_collect_statistics_channels_last_kernel<>",
                "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16>",
                "triton_poi_fused__native_batch_norm_legit_no_training_convolution_relu_3",
                "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>",
                *("aten::native_batch_norm", "aten::native_group_norm_backward"),
            ],
        ),
        (
            "elementwise, rest",
            [
                "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add",
                "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>",
                "triton_poi_fused_convolution_backward_threshold_backward_5",
                *("aten::add", "aten::relu", "aten::comment"),
            ],
        ),
        (
            "copies",
            [
                *("Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "aten::copy_"),
                "void cudnn::engines_precompiled::nchwToNhwcKernel<float, float, float, false>",
                "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda",
            ],
        ),
        (
            "optimizer",
            [
                "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
                "at::native::(anonymous namespace)::TensorListMetadata<2>, BinaryOpListAlpha",
                "Optimizer.step#MSGD.step",
            ],
        ),
    ],
)
def test_kernels_and_operators_are_sorted_by_their_names(kind, names):
    assert {name: profile.kind_of(name) for name in names} == dict.fromkeys(names, kind)


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
    assert sum(kinds.values()) == pytest.approx(found["busy"])
    assert found["wall"] == found["profiled_wall"] < 1
    assert found["idle"] == pytest.approx(found["wall"] - found["busy"])
    assert found["data"] == 0


def test_what_an_optimizer_calls_is_the_optimizers():
    weight = nn.Parameter(torch.rand(1_000_000))
    weight.grad = torch.rand(1_000_000)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    found = profile.profile(lambda steps: [optimizer.step() for _ in range(steps)], 3, CPU)
    assert found["kinds"]["optimizer"] == pytest.approx(found["busy"])


def test_on_cuda_the_device_is_busy_where_kernels_cover_the_time(monkeypatch):
    from torch.autograd import DeviceType

    def event(name, start, end, device=DeviceType.CUDA, span=False):
        time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, time_range=time, device_type=device, is_user_annotation=span
        )

    host = DeviceType.CPU
    events = [
        *(event("sm90_xmma_fprop", 0, 100), event("bn_fw_tr", 50, 150)),  # overlap by 50
        event("Memcpy DtoH", 300, 310),
        *(event("my span", 0, 1000, span=True), event("Optimizer.step#SGD.step", 0, 900)),
        *(event("cudaStreamSynchronize", 0, 400, host), event("cudaStreamSynchronize", 0, 1, host)),
        *(
            event("aten::_local_scalar_dense", 0, 1, host),
            event("cudaDeviceSynchronize", 0, 1, host),
        ),
        event("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 0, 70, host),
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
    assert found["busy"] == pytest.approx(160e-6 / 2)
    assert found["wall"] == 100e-6 and found["profiled_wall"] == 400e-6
    assert found["idle"] == pytest.approx(20e-6)
    assert found["kinds"] == pytest.approx(
        {"convolution, matrix": 50e-6, "normalisation": 50e-6, "copies": 5e-6}
        | {"elementwise, rest": 0, "optimizer": 0}
    )
    assert (found["waits"], found["data"]) == (1, pytest.approx(35e-6))


def result_of(ratio, fraction, cuda="13.0"):
    def row(ratio, fraction):
        attack = dict(median_seconds=0.02, flops=4e12, tflops=200.0, fraction=fraction)
        return dict(
            median_seconds=0.025, images_per_second=5120.4, epochs_per_hour=368.64, ratio=ratio,
            low=ratio - 0.5, high=ratio + 0.25, peak_bytes=2**30, reserved_bytes=3 * 2**29,
            attack=attack,
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


def test_the_table_says_what_was_measured_and_which_goal_was_reached():
    text = speeds.table(result_of(6.5, 0.349))
    assert (
        "| bfloat16 | 25.0 ms | 5120 | 368.6 | 6.50 (6.00 to 6.75) | 20.0 ms | 200 | 34.9% | "
        "1.00 GiB | 1.50 GiB |" in text
    )
    assert "attack: its 10 steps alone, of a batch; the reference 31.2 GFLOP an image" in text
    assert "bfloat16 700 TFLOP/s (8192 rows), float32 50 TFLOP/s (4096 rows)" in text
    assert "convolutions yes, products of matrices no" in text
    assert "goal, 6 x the reference's epochs an hour: reached (6.50 x, bfloat16)" in text
    assert "goal, attack steps at 35% of the bf16 rate: NOT reached (34.9%, bfloat16)" in text
    assert "not able: bfloat16 compile: no" in text
    assert "| reference | 4.0 ms (16%) | " in text
    assert " | 5.0 ms (20%) | 25.0 ms | 1.0 ms | 8.0 |" in text
    assert text.endswith("not able: profile of bfloat16: RuntimeError: CUPTI")
    text = speeds.table(result_of(5.99, 0.35))
    assert "epochs an hour: NOT reached (5.99 x, bfloat16)" in text
    assert "bf16 rate: reached (35.0%, bfloat16)" in text
    text = speeds.table(result_of(9.0, 0.5, cuda=None))
    assert "goal" not in text and "GiB" not in text and "| of bf16 |\n" in text
