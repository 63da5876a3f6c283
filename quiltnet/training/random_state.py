"""torch's random generators of this process, taken down and set again."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """By kind of device: some towers draw on the CPU wherever they compute."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Args: states of a process that may have had another kind of device, which are passed over."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def random_states_as_text(states: Sequence[dict[str, Tensor]]) -> list[dict[str, str]]:
    """``random_state`` of each rank, its bytes in base64."""
    return [
        {kind: base64.b64encode(state.numpy().tobytes()).decode("ascii") for kind, state in of_rank.items()}
        for of_rank in states
    ]


def random_states_from_text(states: Sequence[dict[str, str]]) -> list[dict[str, Tensor]]:
    """What ``random_states_as_text`` was given."""
    return [
        {kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for kind, text in of_rank.items()}
        for of_rank in states
    ]
