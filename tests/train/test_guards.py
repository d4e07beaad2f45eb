"""Bad steps, first losses, the line before the start, the self-test, and signals in real processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from openbagel.config import bagel_7b
from openbagel.flow import interpolate
from openbagel.images import to_pixels
from openbagel.inference.pipeline import Bagel
from openbagel.model.bagel import BagelModel
from openbagel.sequence import Packer, Text, VaeImage, VitImage
from openbagel.train.guards import (
    Guard,
    Start,
    StopSignal,
    Watch,
    banner,
    check_first,
    expected_first_losses,
    overfit_fault,
)
from tests import tiny

ROOT = Path(__file__).parents[2]
NAN = math.nan


def judged(watch: Watch, losses: list[float], name: str = "ce", start: int = 0) -> list[bool]:
    return [not watch.fault({name: loss}, 1.0, step=start + i) for i, loss in enumerate(losses)]


# bad steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_steps_that_are_not_finite_are_skipped_and_counted(bad: float):
    watch = Watch(Guard())
    assert not watch.fault({"ce": 1.0, "mse": 0.4}, 2.0, step=0)
    fault = watch.fault({"ce": 1.0, "mse": bad}, 2.0, step=1)
    assert fault == f"mse is {bad}"
    fault = watch.fault({"ce": 1.0, "mse": 0.4}, bad, step=2)
    assert fault == f"grad_norm is {bad}"
    assert not watch.fault({"ce": 1.0}, 2.0, step=3)
    assert watch.bad_steps == 2 and watch.bad_in_a_row == 0


def test_bad_steps_in_a_row_are_bounded():
    watch = Watch(Guard(max_bad_steps=3))
    assert judged(watch, [NAN, NAN, NAN, 1.0, NAN, NAN, NAN]) == [False] * 3 + [True] + [False] * 3
    with pytest.raises(ValueError, match=r"^step 77: ce is nan, mse is inf; .*max_bad_steps 3 .*lower lr"):
        watch.fault({"ce": NAN, "mse": math.inf}, 1.0, step=77)
    with pytest.raises(ValueError, match="max_bad_steps 0"):
        judged(Watch(Guard(max_bad_steps=0)), [NAN])


def test_spikes_stay_unless_asked_for():
    assert all(judged(Watch(Guard()), [1.0, 1.1] * 60 + [100.0]))


def test_a_spike_is_skipped_and_the_run_goes_on():
    watch = Watch(Guard(skip_spikes=True))
    quiet = [1.0, 1.1] * 32
    assert judged(watch, [*quiet[:-1], 50.0, *quiet]) == [True] * 64 + [True] * 64  # too early to tell
    watch = Watch(Guard(skip_spikes=True))
    assert judged(watch, [*quiet, 1.3, 50.0, 1.0]) == [True] * 65 + [False, True]
    assert not watch.fault({"ce": 200.0}, 1.0, step=0).startswith("mse")
    assert not watch.fault({"ce": -200.0}, 1.0, step=0)  # falling is no spike


def test_each_loss_has_a_window_of_its_own():
    watch = Watch(Guard(skip_spikes=True))
    for step in range(100):
        assert not watch.fault({"ce": 5.0 + step % 2, "mse": 0.4 + 0.001 * (step % 2)}, 1.0, step=step)
    fault = watch.fault({"ce": 5.0, "mse": 0.5}, 1.0, step=100)
    assert fault == "mse jumped to 0.5"
    assert watch.fault({"ce": 50.0, "mse": 0.4}, 1.0, step=101)


def test_nan_does_not_enter_the_window():
    watch = Watch(Guard(skip_spikes=True))
    judged(watch, [1.0, 1.1] * 40 + [NAN])
    assert judged(watch, [1.05, 9.0]) == [True, False]


def test_a_new_level_is_accepted_after_few_skips():
    watch = Watch(Guard(skip_spikes=True))
    verdicts = judged(watch, [1.0, 1.1] * 64 + [3.0, 3.1] * 20)
    assert verdicts[:128] == [True] * 128
    assert 1 <= verdicts.count(False) <= 6 and all(verdicts[-30:])


def test_outliers_are_found_in_a_long_run():
    """reliability.md R15: 50 outliers in 10,000 steps; at least 48 are skipped, at most 5 steps wrongly."""
    rng = random.Random(0)
    outliers = set(rng.sample(range(200, 10_000), 50))
    losses = [rng.gauss(0.5 + math.exp(-s / 2000), 0.03) + (s in outliers) for s in range(10_000)]
    verdicts = judged(Watch(Guard(skip_spikes=True)), losses)
    skipped = {step for step, good in enumerate(verdicts) if not good}
    assert len(skipped & outliers) >= 48 and len(skipped - outliers) <= 5


@pytest.mark.parametrize("cut", [30, 100, 131])
def test_a_restored_watch_judges_alike(cut: int):
    rng = random.Random(1)
    losses = [rng.choice([NAN, rng.gauss(1, 0.1), rng.gauss(1, 0.1), 1.8]) for _ in range(200)]
    guard = Guard(skip_spikes=True, spike_sigma=2.0, max_bad_steps=200)
    whole, first, second = Watch(guard), Watch(guard), Watch(guard)
    expected = judged(whole, losses)
    begun = judged(first, losses[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert begun + judged(second, losses[cut:]) == expected
    assert second.state_dict() == whole.state_dict() and 0 < whole.bad_steps < 200


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="spike_min_seen 200"):
        Guard(spike_min_seen=200)


# the self-test ----------------------------------------------------------------------------------------------


def test_overfit_fault():
    assert not overfit_fault([{"ce": 6.0, "mse": 2.0}, {"ce": 9.0, "mse": 1.5}, {"ce": 0.1, "mse": 0.9}])
    stuck = overfit_fault([{"ce": 6.0, "mse": 2.0}] * 20 + [{"ce": 0.1, "mse": 1.9}])
    assert stuck.startswith("mse went from 2 to 1.9 in 21 steps")
    assert overfit_fault([{"ce": 6.0}, {"ce": NAN}])


def test_overfitting_a_real_pack_passes_and_a_frozen_one_fails():
    c = tiny.config()
    latents = torch.randn(6, c.latent_channels, generator=torch.Generator().manual_seed(0))
    sample = [Text((5, 6, 7), loss=True), VaeImage.noised(latents, (2, 3), 0.7, latents)]
    pack = tiny.packer().pack([sample])
    verdicts = []
    for lr in (3e-3, 0.0):
        model = tiny.randomised(BagelModel(c))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
        history = []
        for _ in range(30):
            ce, mse = (loss.mean() for loss in model.losses(pack))
            (ce + mse).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append({"ce": ce.item(), "mse": mse.item()})
        verdicts.append(not overfit_fault(history))
    assert verdicts == [True, False]


# the start --------------------------------------------------------------------------------------------------


def first_losses(model: BagelModel, latent_scale: float = 1.0) -> dict[str, float]:
    c, generator = model.config, torch.Generator().manual_seed(0)
    samples = []
    for _ in range(4):
        x, noise = torch.randn(2, 16, c.latent_channels, generator=generator)
        ids = torch.randint(0, 250, (20,), generator=generator).tolist()
        target = noise - latent_scale * x
        samples.append([Text(tuple(ids), loss=True), VaeImage.noised(noise, (4, 4), 1.0, target)])
    with torch.no_grad():
        ce, mse = model.losses(Packer(c, tiny.codec()).pack(samples))
    return {"ce": ce.mean().item(), "mse": mse.mean().item()}


@pytest.fixture(scope="module")
def fresh() -> BagelModel:
    model = BagelModel(tiny.config())
    model.initialise(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("strict")
def test_random_weights_start_where_expected(fresh: BagelModel):
    losses = first_losses(fresh)
    assert losses["mse"] == pytest.approx(2, abs=0.2)
    check_first(losses, fresh.config, Start.NOTHING)
    with pytest.raises(UserWarning, match=r"first ce is .* fine-tuning begins: the weights did not load"):
        check_first(losses, fresh.config, Start.CHECKPOINT)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("scale", "hint"), [(1 / 0.3611, "scale and shift"), (0.0, "almost constant")])
def test_wrong_latents_show_at_once(fresh: BagelModel, scale: float, hint: str):
    losses = first_losses(fresh, latent_scale=scale)
    with pytest.raises(UserWarning, match=f"first mse .*{hint}"):
        check_first(losses, fresh.config, Start.PARTS)


@pytest.mark.usefixtures("strict")
def test_nano_starts_where_a_checkpoint_should_and_without_its_weights_does_not():
    bagel = Bagel.load("nano")
    c, generator = bagel.config, torch.Generator().manual_seed(0)
    prompt, question, answer = map(bagel.codec.encode, ("a red circle", "what colour is the circle?", "red"))
    pixels = to_pixels(bagel.generate("a red circle"))
    (clean,) = bagel.encode(pixels, generator).frames
    noise = torch.randn(clean.tokens.shape, generator=generator)
    mixed = interpolate(clean.tokens, noise, 0.8)
    drawing = [Text(prompt), VaeImage.noised(mixed, clean.grid, 0.8, noise - clean.tokens)]
    asking = [VitImage(pixels), Text(question), Text(answer, loss=True)]
    pack = Packer(c, bagel.codec).pack([drawing, asking])
    blank = BagelModel(c)
    blank.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [[float(loss.mean()) for loss in model.losses(pack)] for model in (bagel.model, blank)]
    loaded, fresh = ({"ce": ce, "mse": mse} for ce, mse in found)
    check_first(loaded, c, Start.CHECKPOINT)
    check_first(fresh, c, Start.NOTHING)
    for name in ("ce", "mse"):
        with pytest.raises(UserWarning, match=f"first {name} is"):
            check_first({name: fresh[name]}, c, Start.CHECKPOINT)
        with pytest.raises(UserWarning, match=f"first {name} is"):
            check_first({name: loaded[name]}, c, Start.NOTHING)


@pytest.mark.usefixtures("strict")
def test_official_first_losses_pass_and_absent_ones_are_not_missed():
    check_first({"mse": 0.4063, "ce": 1.34}, bagel_7b(), Start.CHECKPOINT)
    check_first({"ce": 0.5504}, bagel_7b(), Start.CHECKPOINT)
    with pytest.raises(UserWarning, match="labels are wrong"):
        check_first({"ce": 0.01, "mse": 2.0}, bagel_7b(), Start.NOTHING)
    with pytest.raises(UserWarning, match="nan"):
        check_first({"ce": NAN}, bagel_7b(), Start.CHECKPOINT)
    assert expected_first_losses(bagel_7b().understanding_only(), Start.NOTHING).keys() == {"ce"}


def test_banner_of_the_7b():
    with torch.device("meta"):
        model = BagelModel(bagel_7b())
    model.vit_model.requires_grad_(False)
    assert banner(model, start=Start.CHECKPOINT, source="ema.safetensors") == (
        "fine-tuning from ema.safetensors; 14.2 B trainable (understanding expert 7.62 B, generation "
        "expert 6.53 B, connector 17 M, latent projections 14.2 M); frozen: ViT 403 M"
    )


def test_banner_of_adapters_and_of_nothing():
    model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(1000, 2000)})
    model["language_model"].requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        banner(model, start=Start.CHECKPOINT)
    model["language_model"].lora = torch.nn.Linear(1000, 8, bias=False)  # where adapters are bound
    assert banner(model, start=Start.CHECKPOINT, rank=8) == (
        "fine-tuning with LoRA of rank 8; 0.008 M trainable (adapters 0.008 M); "
        "frozen: understanding expert 2 M"
    )
    assert banner(torch.nn.Linear(1000, 1000), start=Start.NOTHING).startswith("training from nothing; 1 M")


# signals ----------------------------------------------------------------------------------------------------

LOOP = """
import os, signal, sys, time
from openbagel.train.guards import StopSignal
before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
with StopSignal() as stop:
    print("ready", flush=True)
    while stop.received is None or len(sys.argv) > 1:
        time.sleep(0.01)
assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before
print("saved after", stop.received.name)
"""
FORKED = """
import os, signal, time
from openbagel.train.guards import StopSignal
with StopSignal() as stop:
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(0.01)
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert stop.received is None
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", LOOP, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_lets_the_step_end(number: signal.Signals):
    process = started()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"saved after {number.name}\n")
    assert err == f"{number.name}: stopping after this step; again to exit at once\n"


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_exits_at_once(second: signal.Signals, code: int):
    process = started("never")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None and process.stderr.readline().startswith("SIGTERM")
    process.send_signal(second)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_still_end():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_installs_nothing():
    code = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15)]; import openbagel.train.guards; "
        "assert before == [signal.getsignal(n) for n in (2, 15)]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
