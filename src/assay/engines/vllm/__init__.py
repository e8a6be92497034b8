"""Drawing in vLLM what Assay's verifier asks for: every token the one that the seed of its place gives.

    from assay.engines.vllm import generate
    ids = generate(llm, items, sampler, max_tokens=512, eos=eos, route="native")

Two routes. `native`: vLLM's GPU sampler (model runner V2) adds the same noise itself; `requests` says what a request must
hold, `engine` whether the engine in use is one that does. `processor`: a logits processor of Assay's draws the token,
for the older model runner V1, for the noise `philox`, and for releases whose noise is another (`draw`; `processor_v1`
and `processor_v2` hang it into vLLM, and alone need it to be imported).

vLLM is no dependency and no extra: which build fits depends on the GPU and its driver, so who has the GPU installs it.
Nothing here was run in vLLM, for want of a GPU; docs/VLLM.md says what was read and what was tested.
"""

from assay.engines.vllm.engine import generate
from assay.engines.vllm.requests import Asked, Route, body, parameters

__all__ = ["Asked", "Route", "body", "generate", "parameters"]
