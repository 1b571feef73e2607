"""The self-checks on the first batch, in order."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.data import collate
from sparsetrain.training.checkpoints import Saver
from sparsetrain.training.distributed.build import Engine
from sparsetrain.training.job import Job, Loaded
from sparsetrain.training.output.export import export
from sparsetrain.training.selfcheck import forward as selfcheck
from sparsetrain.training.selfcheck.round_trip import check_round_trip


def check_before_training(job: Job, loaded: Loaded, engine: Engine, saver: Saver) -> None:
    """Check on the first batch that the run does what its recipe says.

    Raises:
        SparsetrainError: A check failed.
    """
    world, model, ulysses = job.world, loaded.model, engine.ulysses
    position = loaded.rows.state_dict()
    batch = collate([next(loaded.rows)])
    loaded.rows.load_state_dict(position)

    def export_weights(target: Path, *, whole: bool = False) -> None:
        export(model, loaded.tokenizer, target, world, job.recipe.model, whole=whole)

    trust = job.recipe.model.trust_remote_code
    for line in (
        selfcheck.check_document_isolation(model, batch, world, ulysses),
        *selfcheck.check_document_alone(model, batch, world, ulysses),
        *selfcheck.check_shared_sequence(model, batch, world, ulysses),
        selfcheck.check_against_whole_model(engine.deepspeed.module, batch, world),
        selfcheck.check_against_oracle(model, batch, world, ulysses),
        check_round_trip(model, job.output, export_weights, batch.input_ids, world, trust_remote_code=trust),
        saver.check(),
    ):
        job.say(f"self-check: {line}")
