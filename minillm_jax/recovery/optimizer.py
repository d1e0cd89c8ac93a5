"""The optimiser of a recovery: AdamW with warm-up, clipping and accumulation, all of optax."""

from typing import Any

import optax

from minillm_jax.recovery.settings import Training

# Consecutive updates that may be skipped because a gradient is not finite: all, because the loop stops at the first.
ANY = 2**31 - 1


def learning_rates(training: Training, updates: int) -> optax.Schedule:
    """The learning rate of each update, from 0.

    Args:
      training: learning rate, warm-up and schedule.
      updates: number of all updates.
    """
    warmup = min(training.warmup, max(updates - 1, 0))
    rest = max(updates - warmup, 1)
    falling = {
        "linear": optax.linear_schedule(training.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(training.learning_rate, rest),
        "constant": optax.constant_schedule(training.learning_rate),
    }[training.schedule]
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, training.learning_rate, warmup), falling], [warmup])


def optimizer(training: Training, updates: int) -> optax.MultiSteps:
    """AdamW on the mean gradient of `batch / micro_batch` calls. An update that is not finite changes nothing.

    Args:
      training: the settings.
      updates: number of all updates.
    """
    clip = optax.clip_by_global_norm(training.clip) if training.clip else optax.identity()
    adamw = optax.adamw(learning_rates(training, updates), weight_decay=training.weight_decay)
    finite = optax.apply_if_finite(optax.chain(clip, adamw), ANY)
    return optax.MultiSteps(finite, training.batch // training.micro_batch)


def was_finite(state: Any) -> bool:
    """Whether the last gradient of an optimiser's state was finite; False also where its mean is not finite yet."""
    return bool(state.inner_opt_state.last_finite)
