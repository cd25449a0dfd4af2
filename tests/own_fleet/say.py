"""What transformers says, in this process, of checkpoints: `python say.py DIRECTORY…`

Prints by directory the texts that `transformers serve` has to answer as well, one for each of
REQUESTS, and a digest of the log-probabilities of fixed tokens.
"""

import hashlib
import json
import sys

DRAWN = {"do_sample": True, "top_k": 0}
REQUESTS = [
    {"prompt": "the quick ", "seed": seed, "generation": {"max_new_tokens": 48, **how}}
    for seed, how in enumerate([{"do_sample": False}, DRAWN, DRAWN])
]
"""Greedy text, and text that is drawn from all tokens: a seed draws it as the weights say."""


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    said = {}
    for directory in sys.argv[1:]:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        texts = []
        for request in REQUESTS:
            asked = tokenizer(request["prompt"], return_tensors="pt")
            torch.manual_seed(request["seed"])
            config = GenerationConfig(**request["generation"])
            tokens = model.generate(**asked, generation_config=config)[0]
            text = tokenizer.decode(tokens[asked.input_ids.shape[1] :], skip_special_tokens=True)
            texts.append(text)
        with torch.no_grad():
            logprobs = model(torch.arange(64)[None]).logits.float().log_softmax(-1)
        digest = hashlib.sha256(logprobs.numpy().tobytes()).hexdigest()
        said[directory] = {"texts": texts, "logprobs": digest}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
