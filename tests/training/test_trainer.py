"""The training loop on a tiny module: precision, clipping, and an exact continuation."""

import io
import logging
import random

import numpy as np
import pytest
import torch
from detbackbones.training.progress import ProgressPrinter
from detbackbones.training.trainer import Trainer, seed_step
from detectron2.engine import hooks
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver import WarmupParamScheduler
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    """Two losses that depend on the data and, by dropout, on random numbers."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.seen = scale, []
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, data):
        out = self.layers(data)
        self.seen.append(out.dtype)
        return {"loss_a": out.float().pow(2).mean() * self.scale, "loss_b": out.float().mean()}


class Data:
    """Batch k is a function of k."""

    start_iter = 0

    def __iter__(self):
        k = self.start_iter
        while True:
            yield torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
            k += 1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def make(model=None, data=None, optimizer=sgd, **settings):
    model = model or Net()
    settings = {"device": "cpu", "seed": 0, **settings}
    return Trainer(model, data or Data(), optimizer(model.parameters()), **settings)


def weights(trainer):
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def average(trainer):
    return nn.utils.parameters_to_vector(trainer.average.module.parameters()).detach().clone()


def train(trainer, start, stop, max_iter=10):
    """Train from start to stop of a schedule of max_iter."""
    schedule = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.3)
    trainer.register_hooks([hooks.LRScheduler(scheduler=schedule), Stop(stop)])
    try:
        trainer.train(start, max_iter)
    except KeyboardInterrupt:
        pass


class Stop(hooks.HookBase):
    def __init__(self, stop):
        self.stop = stop

    def after_step(self):
        if self.trainer.iter + 1 == self.stop:
            buffer = io.BytesIO()
            torch.save(self.trainer.state_dict(), buffer)
            self.trainer.saved = buffer.getvalue()
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("amp_dtype", [None, "bfloat16", "float16"])
def test_an_interrupted_run_continues_exactly(optimizer, amp_dtype):
    settings = {"optimizer": optimizer, "amp_dtype": amp_dtype, "clip_grad": {"max_norm": 0.5}}
    settings |= {"accumulation_steps": 3, "ema_decay": 0.9}
    whole = make(**settings)
    train(whole, 0, 10)

    first = make(**settings)
    train(first, 0, 4)
    assert not torch.equal(weights(first), weights(whole))
    second = make(model=Net(), **settings)
    second.model.load_state_dict(first.model.state_dict())
    state = torch.load(io.BytesIO(first.saved), weights_only=True)
    second.load_state_dict(state)
    assert bool(state["scaler"]) == (amp_dtype == "float16")
    train(second, second.iter + 1, 10)
    assert torch.equal(weights(second), weights(whole))
    assert torch.equal(average(second), average(whole))
    assert not torch.equal(average(whole), weights(whole))


def test_the_seed_decides():
    results = []
    for seed, rank in (3, 0), (3, 0), (4, 0), (3, 1):
        trainer = make(seed=seed, rank=rank)
        train(trainer, 0, 5)
        results.append(weights(trainer))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[0], results[3])


def test_each_generator_is_seeded():
    def draw(*place):
        seed_step(*place)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw(0, 0, 1)
    assert draw(0, 0, 1) == first
    for other in draw(0, 0, 2), draw(0, 1, 0), draw(1, 0, 0):
        assert all(a != b for a, b in zip(first, other))


def test_another_seed_cannot_continue():
    state = make(seed=1).state_dict()
    with pytest.raises(ValueError, match="train.seed=2 must be 1, .* interrupted run$"):
        make(seed=2).load_state_dict(state)


def test_a_run_without_scaler_continues_with_one():
    trainer = make(amp_dtype="float16")
    scale = trainer.scaler.get_scale()
    trainer.load_state_dict(make().state_dict())
    assert trainer.scaler.get_scale() == scale > 1


@pytest.mark.parametrize("amp_dtype", [None, "float16"])
@pytest.mark.parametrize(
    ("clip_grad", "bound"), [(None, None), ({"max_norm": 0.25}, 0.25), ({"max_norm": 1e9}, None)]
)
def test_clipping_bounds_the_step(amp_dtype, clip_grad, bound):
    model = Net(scale=50.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trainer = Trainer(
        model,
        Data(),
        torch.optim.SGD(model.parameters(), lr=1.0),
        device="cpu",
        seed=0,
        amp_dtype=amp_dtype,
        clip_grad=clip_grad,
    )
    if amp_dtype == "float16":  # the scale it starts with overflows
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 8.0})
    trainer.train(0, 1)
    step = (weights(trainer) - before).norm().item()  # at this rate, the norm of the gradient
    assert step > 1 if bound is None else step == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(
    ("amp_dtype", "dtype"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_precision(amp_dtype, dtype):
    trainer = make(amp_dtype=amp_dtype)
    trainer.train(0, 2)
    assert trainer.model.seen == [dtype, dtype]
    assert weights(trainer).dtype == torch.float32


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="train.amp.dtype='fp16' .* 'float16', 'bfloat16'"):
        make(amp_dtype="fp16")


class Dense(DenseDetector):
    """The running mean of a dense detector, without the detector."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, data):
        return {"loss": self.weight / self._ema_update("loss_normalizer", data.sum().item(), 100)}


def test_the_running_mean_of_a_dense_detector_continues():
    whole, first, second = make(Dense()), make(Dense()), make(Dense())
    second.load_state_dict(second.state_dict())  # there is none before the first iteration
    train(whole, 0, 10)
    train(first, 0, 4)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(torch.load(io.BytesIO(first.saved), weights_only=True))
    train(second, 4, 10)
    assert second.model.loss_normalizer == whole.model.loss_normalizer
    assert torch.equal(weights(second), weights(whole))


def test_data_that_cannot_start_anywhere_is_warned_of(caplog):
    batches = [torch.ones(3, 4)] * 2
    make(data=batches).train(0, 2)
    assert "start_iter" not in caplog.text
    make(data=batches).train(1, 2)
    assert "no start_iter" in caplog.text


def test_progress(caplog):
    printer = ProgressPrinter(max_iter=3, images_per_iter=2)
    with EventStorage() as storage, caplog.at_level(logging.INFO):
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalars(total_loss=1.5 + iteration, lr=0.125)
            printer.write()
    lines = [r.getMessage() for r in caplog.records if r.name == "detbackbones.progress"]
    assert len(lines) == 3
    assert lines[0].startswith("iter 1/3  total_loss 1.5  lr 0.125  ")
    assert "img/s" not in lines[0] and "img/s" in lines[1] and "eta 0:00:00" in lines[1]
    assert lines[2].startswith("iter 3/3") and "total_loss 2.5" in lines[2]  # the median
    assert lines[2].endswith("MiB") or "GPU" in lines[2]


def test_the_average_follows_the_weights():
    """By the formula of its docstring, with the decay where that is less."""
    trainer, expected = make(ema_decay=0.5), None
    for n in range(4):
        trainer.train(n, n + 1)
        decay = min(0.5, 1 - (n + 1) ** (-2 / 3)) if n else 0
        last = weights(trainer)
        expected = last if expected is None else decay * expected + (1 - decay) * last
        torch.testing.assert_close(average(trainer), expected)
    assert not trainer.average.module.training
    assert not torch.equal(average(trainer), weights(trainer))


@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_of_the_whole_run(first):
    state = make(ema_decay=0.9 if first else None).state_dict()
    sentence = f"train.model_ema.enabled={not first} must be {first}, .* interrupted run$"
    with pytest.raises(ValueError, match=sentence):
        make(ema_decay=None if first else 0.9).load_state_dict(state)


class Counting(nn.Module):
    """A loss that is divided by the number of rows that are above 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def loss_divisor(self, data):
        return max((data[:, 0] > 0).sum().item(), 1)

    def forward(self, data):
        return {"loss": (data @ self.weight).square().sum() / self.loss_divisor(data)}


def gradient(model, data, steps, **settings):
    """The gradient of a batch in so many parts, and its losses."""
    trainer = make(model, accumulation_steps=steps, **settings)
    losses = trainer._accumulate(data)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("model", [Net, Counting])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(model):
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    data[0, 0] = data[1, 0] = -1.0  # in the first part there is nothing to count
    (one, losses), (other, others) = (gradient(model().eval(), data, steps) for steps in (1, 3))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=1e-6)
    assert one.norm() > 0.1


def test_parts_of_a_batch_are_shared_between_processes_once(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shared = []
        for steps in (1, 3):
            calls = []
            model = DistributedDataParallel(Counting())

            def count(state, bucket, calls=calls):
                calls.append(bucket.buffer().clone())
                done = torch.futures.Future()
                done.set_result(bucket.buffer())
                return done

            model.register_comm_hook(None, count)
            data = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
            gradient(model, data, steps)
            assert len(calls) == 1
            shared += calls
        torch.testing.assert_close(shared[1], shared[0])
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_is_told_how_much_has_passed():
    class Annealed(Net):
        def anneal(self, progress):
            self.told = [*getattr(self, "told", []), progress]

    trainer = make(Annealed())
    trainer.train(2, 5)
    assert trainer.model.told == [2 / 5, 3 / 5, 4 / 5]
