"""Fields of a vendor's training recipes that have no meaning in a declaration here, and why."""

from __future__ import annotations

from collections.abc import Mapping

YOUR_TRAINER = "the trainer is your own: name it in `trainer`, with what it takes as arguments"
NO_JOB = "no job is started here: remove it"
REFUSED_TRAINING_FIELDS: Mapping[str, str] = {
    "training_shape_id": YOUR_TRAINER,
    "reference_training_shape_id": "set `reference`, or leave it out: the trainer's function again",
    "ref_training_shape_id": "set `reference`, or leave it out: the trainer's function again",
    "job_id": NO_JOB,
    "policy_job_id": NO_JOB,
    "region": NO_JOB,
    "replica_count": "replicas that are expected: `readiness.replica_count` of the cycle",
    "node_count": YOUR_TRAINER,
    "accelerator_type": YOUR_TRAINER,
    "accelerator_count": YOUR_TRAINER,
    "lora_rank": YOUR_TRAINER,
    "extra_args": YOUR_TRAINER,
    "timeout_s": "`readiness` and `sampling` of the cycle have the limits",
    "purpose": NO_JOB,
    "skip_validations": "nothing here is done without being checked: remove it",
    "infra": "the service exists beforehand; nothing here creates one",
    "deployment": "the service is a block: `blocks.account`, or a saved one named in the cycle",
    "weight_sync": "its fields are `windows` here, and `readiness` and `cadence` of the cycle",
    "weight_sync_scope": "choose services by name: `service` and `other_services` of the cycle",
    "weight_sync_timeout": "it is `readiness.weight_sync_timeout` of the cycle",
    "hot_load_trainer_job": "the bucket is yours: the url of the cycle's store",
    "max_head_offpolicy_versions": "it is a field of `sampling` of the cycle, above 0 only in "
    "python -m flows.async_rl_loop",
    "max_concurrency_rollout_sample": "it is `sampling.concurrency.max_concurrency` of the cycle",
    "pipeline_chunks_per_step": "a field of python -m flows.async_rl_loop alone; "
    "`step.micro_batch_tokens` bounds memory",
    "completions_per_prompt": "it is a field of `sampling` of the cycle",
    "max_completion_tokens": "it is a field of `sampling` of the cycle",
    "temperature": "it is a field of `sampling` of the cycle",
    "max_seq_len": "it is a field of `sampling` of the cycle",
    "min_group_size": "it is a field of `sampling.groups` of the cycle",
    "max_incomplete_group_retries": "it is a field of `sampling.groups` of the cycle",
    "dataset": "it is a field of `problems` of the cycle",
    "max_rows": "it is a field of `problems` of the cycle",
    "save_final_checkpoint": "the last version is always exported and published: remove it",
    "wandb": "it is a field of the cycle",
    "router_replay": "it is an argument of the torch trainer, and needs "
    "`sampling.include_routing_matrix` of the cycle",
    "branch": "another run_id with `init_from_checkpoint: RUN:STEP` is a branch",
    "tis": "it is a field of `loss`",
    "anchor_logp": "it is `anchor` of `loss`",
    "grad_clip_norm": "it is a field of `step.adam`",
    **dict.fromkeys(("epochs", "shuffle", "seed"), "it is a field of `windows`"),
    **dict.fromkeys(
        ("prompt_groups_per_step", "weight_sync_interval"), "it is a field of `windows`"
    ),
    **dict.fromkeys(("policy_loss", "kl_beta", "eps_clip", "eps_clip_high"), "a field of `loss`"),
    **dict.fromkeys(("learning_rate", "lr_scheduler"), "it is a field of `schedule`"),
    **dict.fromkeys(
        ("ppo_n_minibatches", "grad_accumulation_normalization"), "it is a field of `step`"
    ),
}
REFUSED_TRAINING_PREFIXES: Mapping[str, str] = {"cleanup_": NO_JOB, "accelerator_": YOUR_TRAINER}
