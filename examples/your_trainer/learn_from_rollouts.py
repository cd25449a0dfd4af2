"""A plain transformers loop on the cycle: it publishes what it saves, and learns from what comes
back.

    python learn_from_rollouts.py MODEL DIR CYCLE.json STORE PREFECT_API_URL [VERSIONS]

Needs torch, transformers and `hotload[clients]`, no Prefect; `python -m examples.your_trainer`
runs it against three emulated replicas.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hotload.clients.handoff import RolloutReader, Store
from hotload.clients.trigger import publish
from hotload.dataset.trainer_batch import make_batch, to_tensors, trl_batch

base, out, cycle_file, store_url, prefect_api_url, *count = sys.argv[1:]
cycle, store = json.loads(Path(cycle_file).read_text()), Store(store_url)
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for version in range(1, 1 + int(count[0] if count else 3)):
    path = str(Path(out, f"{version:06d}"))
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    run = publish(prefect_api_url, {**cycle, "checkpoint": path, "policy_version": version})
    assert run.is_completed, run.message
    with RolloutReader(store, cycle["run_id"], version, consumer="trainer-0").blocking() as reader:
        for delivery in reader:
            batch = make_batch(delivery.frame)
            if not len(batch):  # nothing to learn from
                reader.acknowledge(delivery)
                continue
            tensors = to_tensors(trl_batch(batch))
            prompt, completion = tensors["prompt_ids"], tensors["completion_ids"]
            seen = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1)
            logits = model(torch.cat([prompt, completion], dim=1), attention_mask=seen).logits
            logprobs = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
            logprobs = logprobs.gather(-1, completion.unsqueeze(-1)).squeeze(-1)
            in_loss = torch.from_numpy(batch.loss_mask)
            loss = -(logprobs * in_loss * tensors["advantages"].unsqueeze(-1)).sum() / in_loss.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            reader.acknowledge(delivery, batch.by_frame_row(logprobs.detach()))
            print(f"version {version}: {len(batch)} samples, reward {batch.rewards.mean():.3f}")
        print(
            f"version {version}: trainer against sampler, k3 {reader.drift().k3:.2g} nats a token"
        )
