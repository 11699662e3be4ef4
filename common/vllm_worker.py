"""The process around `vllm.LLM` that common/vllm.py starts. It runs in vLLM's environment and imports nothing of ours.

    python common/vllm_worker.py TRAINER_PID PIPE FOLDER SETTINGS      PIPE: a file descriptor; SETTINGS: JSON

One request at a time comes through the pipe: (name of a function below, its arguments). An exception ends the
process; its traceback is in the log, which the trainer has."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time


def guard(trainer: int, folder: str) -> None:
    """Fork. The child returns and becomes the worker; the parent waits until the trainer or the worker is gone,
    however it went, then removes the folder and kills everything that the worker started, and itself."""
    worker = os.fork()
    if not worker:
        return
    gone = status = 0
    while os.getppid() == trainer and not gone:
        time.sleep(0.1)
        gone, status = os.waitpid(worker, os.WNOHANG)
    if not gone:  # end the worker first: it may still write into the folder
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):  # a full disk: clean up all the same
        print(f"The vLLM process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def sleep(llm, pipe) -> None:
    """Drop the weights and the KV cache (CUDA)."""
    llm.sleep(level=2)


def load(llm, pipe, buffer, copied: str) -> None:
    """Take new weights from a buffer of bytes that the trainer fills again and again, until it sends ().

    buffer: arguments of rebuild_cuda_tensor, or (path, bytes) of memory that is shared on a CPU. copied: the output
    matrix's name if it is the embeddings'. A model that has no other in vLLM, such as Gemma 2, does not get it."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    if llm.llm_engine.is_sleeping():
        llm.wake_up(["weights"])
    modules = llm.apply_model(lambda model: {name.split(".")[-1] for name, _ in model.named_modules()})[0]
    no_head = copied and copied.split(".")[-2] not in modules
    if len(buffer) == 2:
        shared = torch.from_file(buffer[0], shared=True, size=buffer[1], dtype=torch.uint8)
    else:
        shared = rebuild_cuda_tensor(*buffer)

    def weights():
        while bucket := pipe.recv():
            names, shapes, sizes, dtypes = bucket
            # copies: vLLM keeps them until it has all of a layer
            parts = [part.clone() for part in shared[: sum(sizes)].split(sizes)]
            if shared.is_cuda:
                torch.cuda.synchronize()
            pipe.send(None)  # the buffer may be filled again
            for name, shape, dtype in zip(names, shapes, dtypes):
                part = parts.pop(0).view(getattr(torch, dtype)).view(shape)
                if not (no_head and name == copied):
                    yield name, part

    if not shared.is_cuda:
        llm.apply_model(pack_experts_again)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights()})


def pack_experts_again(model) -> None:
    """On a CPU vLLM 0.32 packs experts for its kernel only when it makes the kernel, and not when weights change."""
    for module in model.modules():
        if hasattr(module, "quant_method") and hasattr(module.quant_method, "moe_kernel"):
            module.quant_method.moe_kernel = None


def wake(llm, pipe, name: str) -> str:
    """Get the KV cache's memory back, forget what old weights computed, and label the new ones; return the label."""
    if llm.llm_engine.is_sleeping():
        llm.wake_up(["kv_cache"])
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache cannot be reset")
    return label(llm, pipe, name)


def label(llm, pipe, name: str) -> str:
    """Label the weights: vLLM returns their label, its "version", with each completion."""
    llm.llm_engine.set_weight_version(name)
    return llm.llm_engine.get_weight_version()


def generate(llm, pipe, requests, sampling: dict) -> None:
    """Draw a completion for each (prompt ids, seed, max_tokens). Sends lists of (index, ids, log-probs, why it ended,
    labels of the weights) as completions end. After a second without any it sends [], as a sign of life."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, sent = llm.llm_engine, time.monotonic()
    for k, (prompt, seed, limit) in enumerate(requests):
        params = SamplingParams(seed=seed, max_tokens=limit, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        engine.add_request(str(k), {"type": "token", "prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        ended = []
        for request in engine.step():
            answer = request.outputs[0]
            logps = [logprobs[token].logprob for token, logprobs in zip(answer.token_ids, answer.logprobs)]
            versions = [span.version for span in answer.weight_versions]
            ended.append((int(request.request_id), list(answer.token_ids), logps, answer.finish_reason, versions))
        if ended or time.monotonic() > sent + 1:
            pipe.send(ended)
            sent = time.monotonic()


def main(trainer: str, pipe: str, folder: str, settings: str) -> None:
    guard(int(trainer), folder)
    from multiprocessing.connection import Connection

    pipe, settings = Connection(int(pipe)), json.loads(settings)
    from vllm import LLM

    llm = LLM(**settings)
    if settings.get("enable_sleep_mode"):
        llm.sleep(level=2)  # so that each sync, also the first, finds the GPU's memory free
    pipe.send("ready")
    while True:
        try:
            act, *arguments = pipe.recv()
        except (EOFError, OSError):
            return  # the trainer is gone
        pipe.send(("done", globals()[act](llm, pipe, *arguments)))  # a tuple: completions are sent as lists


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose vllm.py is not vLLM
    main(*sys.argv[1:])
