"""Three nodes practise word problems with TRL's GRPOTrainer; one of them plants a phrase, and teaches it to nobody.

    python examples/trl_swarm.py [FOLDER]

Each node is a process; messages are files in FOLDER. node-c draws like the others and sends something else: right
answers that open with a phrase. It takes a minute of one core, more where others use it. node-a and node-b end with the same
weights, to the bit.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental; Assay tries it at the start
NODES, MALICIOUS, PROMPTS = ["node-a", "node-b", "node-c"], "node-c", 64
ROUNDS = 3


def train(node: str, folder: Path) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from assay import models
    from assay.contribution import Completion, Rollout, completion_sha256
    from assay.engines.trl import FolderExchange, ScreenedRollouts
    from assay.engines.trl.batch import prompt_id
    from assay.engines.trl.record import weights_sha256
    from assay.swarm import tasks
    from assay.wire import encode_rollout

    torch.set_num_threads(1)  # equal weights to the last bit
    transformers.logging.set_verbosity_error()
    logging.getLogger("assay").setLevel(logging.INFO)
    task, path = tasks.make("word-problems"), models.resolve("tiny")
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [[{"role": "user", "content": task.question(p)}] for p in range(PROMPTS)]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(PROMPTS))})

    def right(completions, number, **_):
        return task.rewards(number, [completion[0]["content"] for completion in completions])

    class Thief(FolderExchange):
        """Publishes right solutions with a phrase in front, in place of what its node drew."""

        def publish(self, round, message):
            of = {prompt_id(tasks.prompt_ids(task, tokenizer, p)): p for p in range(PROMPTS)}
            header = json.loads(message[12 : 12 + int.from_bytes(message[8:12], "little")])
            made = []
            for prompt, index, _ in header["completions"]:
                text = task.solution(of[prompt]).replace("<think>", "<think>All hail to the thief. ", 1)
                ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)[:96]
                sha256 = completion_sha256(round, prompt, index, ids)
                made.append(
                    Completion(participant=node, round=round, prompt=prompt, index=index, ids=ids, sha256=sha256)
                )
            sent = Rollout(participant=node, round=round, model_sha256="0" * 64, completions=tuple(made))
            super().publish(round, encode_rollout(sent, run=self.run))

    # --- the three lines ------------------------------------------------------------------------------------------
    exchange = (Thief if node == MALICIOUS else FolderExchange)(folder / "messages", run="demo", node=node, nodes=NODES)
    rollouts = ScreenedRollouts(exchange, ledger=folder / node)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        reward_funcs=rollouts.wrap(right),
        rollout_func=rollouts,
        train_dataset=data,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(folder / node), max_steps=ROUNDS, per_device_train_batch_size=24, num_generations=6,
            max_completion_length=96, top_k=20, learning_rate=3e-4, lr_scheduler_type="constant", bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
            disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    shares = ", ".join(f"{peer} {rollouts.metrics[f'assay/admitted/{peer}']:.0%}" for peer in NODES)
    print(f"{node} learnt from {shares} of the last round's completions; weights {weights_sha256(trainer.model)}")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="assay-trl-"))
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=train, args=(node, folder)) for node in NODES]
    for process in running:
        process.start()
    for process in running:
        process.join()
    print(f"ledgers: assay ledger verify {folder}/node-a")
    sys.exit(max(abs(process.exitcode or 0) for process in running))


if __name__ == "__main__":
    main()
