"""Tests that need a GPU; `.ci/gpu` runs them. Without one all are skipped."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from agent import (Agent, AgentConfig, agent_losses, autocast, dream_of, freeze,
                   imagination_losses, imagine_rollout)
from data import ActionSpec
from dynamics import (Batch, Dream, Dynamics, DynamicsConfig, dynamics_losses, ramp_weight,
                      sample_tau_d)
from tokenizer import compile_module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SPEC, CUDA = ActionSpec(classes=(5,)), torch.device("cuda")
B, T, Z = 8, 16, 64


@pytest.fixture
def nets():
    torch.manual_seed(0)
    cfg = DynamicsConfig(channels=Z, dim=64, heads=4, kv_heads=2, tasks=3, context=8)
    nets = Dynamics(cfg, SPEC), Agent(AgentConfig(hidden=32), 64, SPEC, 3)
    with torch.no_grad():
        for net in nets:
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))      # nothing is zero
    return nets


def play_batch(device):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, 9, Z, generator=generator)
    actions = torch.randint(5, (B, T, 1), generator=generator).float()
    events = (torch.rand(B, T, 3, generator=generator) < 0.1).float()
    batch = Batch(z, actions, torch.ones(B, T).bool(), torch.zeros(B, T).long(), events,
                  torch.ones(B, T), asked=torch.ones(B, T).bool())
    return batch.to(device)


def test_losses_are_those_of_the_cpu(nets, monkeypatch):
    """Fails if a mask, an index or a broadcast differs between the devices."""
    noise = torch.randn(B, T, 9, Z, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("dynamics.noise_like", lambda z, _: noise[:len(z)].to(z.device))
    dynamics, agent = nets
    tau, d = sample_tau_d(B, T, 16, B // 2, torch.Generator().manual_seed(2))
    found = []
    for device in (torch.device("cpu"), CUDA):
        dynamics.to(device)
        agent.to(device)
        batch, cloned = play_batch(device), torch.arange(B, device=device) > 3
        losses, h, _ = dynamics_losses(dynamics, batch, tau, d, ramp_weight(tau), None)
        more, _ = agent_losses(agent, h, batch, cloned)
        found.append({name: float(x) for name, x in (losses | more).items()})
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_no_step_waits_for_the_gpu(nets):
    """Fails if a training step's losses or an imagined rollout read a number back."""
    dynamics, agent = (net.to(CUDA) for net in nets)
    batch, cloned = play_batch(CUDA), torch.arange(B, device=CUDA) > 3
    tau, d = sample_tau_d(B, T, 16, B // 2, torch.Generator().manual_seed(2))
    noise = torch.Generator(CUDA).manual_seed(0)

    def step():
        with autocast(CUDA):
            losses, h, _ = dynamics_losses(dynamics, batch, tau, d, ramp_weight(tau), noise)
            losses |= agent_losses(agent, h, batch, cloned)[0]
            sum(losses.values()).backward()
            rollout = imagine_rollout(dream_of(dynamics, agent, noise), agent, batch, 3)
            imagination_losses(agent, rollout.h, rollout.actions, batch.task[:, -1])

    step()                      # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_frames_are_those_of_eager_ones(nets):
    """Fails if the compiled pass of a frame sees a stale slot or ring."""
    dynamics, batch, found = freeze(nets[0], CUDA, "fp32"), play_batch(CUDA), []
    for _ in range(2):
        dream = Dream(dynamics, torch.Generator(CUDA).manual_seed(0))
        frames = [dream.step(batch.actions[:, t:t + 1])[0] for t in range(T)]
        found.append(torch.cat(frames, 1))
        compile_module(dynamics, CUDA, frozen=True)
    assert dynamics.transformer.compiled and torch.allclose(*found, atol=1e-3)
