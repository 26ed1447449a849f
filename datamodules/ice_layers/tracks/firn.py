"""Density of snow and firn, and what melt leaves of yearly layers.

Shapes: `...` any, L layers (newest first).
"""

from __future__ import annotations

import numpy as np

from fulgurite.datamodules.ice_layers.stack import Array

__all__ = ["RHO_ICE", "RHO_SNOW", "herron_langway", "layer_density", "smb_to_layers"]

#: Density of ice, and of fresh snow at the surface [g cm⁻³].
RHO_ICE, RHO_SNOW = 0.917, 0.315
_RHO_CRITICAL = 0.55
_GAS = 8.314  # [J mol⁻¹ K⁻¹]
_DENSEST = 0.86


def herron_langway(age: Array, accumulation: Array, temperature: Array) -> Array:
    """Density of firn by its age, in closed form [g cm⁻³].

    Shape:
        - age: (...) [years].
        - accumulation: (...) [m w.e./yr].
        - temperature: (...) mean of the year [K].

    Source: docs/papers/ice_layers.md section 6.2 [M]; Herron and Langway (1980).

    Example:
        >>> herron_langway(np.array([0.0, 10.0, 1e6]), np.array(0.3), np.array(250.0)).round(3)
        array([0.315, 0.448, 0.917])
    """
    a = np.maximum(accumulation, 0.02)  # else the age of the critical density is infinite
    k0 = 11.0 * np.exp(-10_160.0 / (_GAS * temperature)) * a
    k1 = 575.0 * np.exp(-21_400.0 / (_GAS * temperature)) * np.sqrt(a)
    critical = np.log((RHO_ICE - RHO_SNOW) / (RHO_ICE - _RHO_CRITICAL)) / k0
    upper = RHO_ICE - (RHO_ICE - RHO_SNOW) * np.exp(-k0 * age)
    below = np.maximum(age - critical, 0.0)
    lower = RHO_ICE - (RHO_ICE - _RHO_CRITICAL) * np.exp(-k1 * below)
    density: Array = np.where(age < critical, upper, lower)
    return density


def layer_density(balance: Array, temperature: Array, refreeze: Array, age: Array) -> Array:
    """Density of layers: Herron and Langway's, and what refrozen melt adds [g cm⁻³].

    Shape:
        - balance: (..., L) what is left of each year's snow [m w.e./yr].
        - temperature: (..., L) mean of each year [K].
        - refreeze: (..., L) refrozen melt of each year [m w.e.].
        - age: (L,) age of each layer's lower boundary [years].

    Source: docs/papers/ice_layers.md section 6.2 [M].

    Example:
        >>> one = np.ones(2)
        >>> layer_density(0.3 * one, 250 * one, 0 * one, np.array([1.0, 2.0])).round(2)
        array([0.32, 0.34])
    """
    middle = age - np.diff(age, prepend=0.0) / 2
    density = herron_langway(
        middle,
        balance.mean(-1, keepdims=True),
        temperature.mean(-1, keepdims=True),
    )
    ice = 0.25 * np.clip(refreeze, 0.0, None) / np.maximum(balance, 0.02)
    dense: Array = np.minimum(density + ice, _DENSEST)
    return dense


def smb_to_layers(balance: Array) -> Array:
    """What is left of yearly layers: a negative year eats those under it [m w.e.].

    Shape:
        - (..., L), newest first, in and out.

    Source: docs/papers/ice_layers.md sections 5 and 6.2 (without the slip of the original code).

    Example:
        >>> smb_to_layers(np.array([0.2, -0.3, 0.1, 0.4]))
        array([0.2, 0. , 0. , 0.2])
    """
    layers = np.maximum(balance, 0.0)
    for year in range(balance.shape[-1] - 1, -1, -1):  # as they came: the oldest first
        deficit = np.maximum(-balance[..., year], 0.0)
        for older in range(year + 1, balance.shape[-1]):
            if not deficit.any():
                break
            eaten = np.minimum(layers[..., older], deficit)
            layers[..., older] -= eaten
            deficit = deficit - eaten
    return layers
