"""What the tests on a GPU share.

They need torch with CUDA and cuda-bindings. What else a module needs, it skips without.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from parnet_engines.cuda.bindings import BindingsDriver
from parnet_engines.cuda.driver import CudaError
from parnet_engines.proof.accuracy import LIMITS
from parnet_export.errors import MissingBackendError
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.verify import relative_error


@pytest.fixture(scope="session")
def driver():
    """The machine's driver, or a skip that says what is missing."""
    try:
        found = BindingsDriver()
        count = len(found.gpus())
    except (CudaError, MissingBackendError) as error:
        pytest.skip(f"no GPU: {error}")
    if not count:
        pytest.skip("no GPU: the driver finds none")
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA, or finds no GPU")
    return found


@pytest.fixture(autouse=True)
def _only_with_a_gpu(driver):
    """Skip every test here on a machine without one."""


@pytest.fixture(scope="session")
def exported():
    return export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def bundle(request, exported, tmp_path_factory):
    model, provenance = exported
    path = tmp_path_factory.mktemp(request.param) / "b"
    return make_bundle(model, provenance, path, precision=request.param, prove=False)[0]


@pytest.fixture(scope="session")
def single_bundle(exported, tmp_path_factory):
    model, provenance = exported
    path = tmp_path_factory.mktemp("single") / "b"
    return make_bundle(model, provenance, path, prove=False)[0]


@pytest.fixture
def image(request):
    return np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="session")
def memory_taken():
    """Return how many bytes of GPU 0 further calls of a function take, after some of them."""

    def measure(call, *, first: int = 20, then: int) -> int:
        for _ in range(first):
            call()
        torch.cuda.synchronize()
        before, _ = torch.cuda.mem_get_info(0)
        for _ in range(then):
            call()
        torch.cuda.synchronize()
        after, _ = torch.cuda.mem_get_info(0)
        return before - after

    return measure


@pytest.fixture(scope="session")
def run_in_place():
    """Return what a session writes into a torch tensor in three runs, and what it should."""

    def run(session, image):
        expected = session.run({"image": image})["logits"]
        source = torch.from_numpy(image).cuda()
        target = torch.empty(expected.shape, device="cuda")
        written = []
        for _ in range(3):
            target.zero_()
            found = session.run({"image": source}, outputs={"logits": target})
            assert found["logits"] is target
            written.append(target.cpu().numpy())
        return written, [expected] * 3

    return run


@pytest.fixture(scope="session")
def run_in_order():
    """Return what a session writes between two works of a torch stream, and what it should."""

    def run(session, image):
        expected = session.run({"image": image})["logits"]
        stream = torch.cuda.Stream()
        source = torch.zeros(image.shape, device="cuda")
        target = torch.empty(expected.shape, device="cuda")
        session.run({"image": source}, outputs={"logits": target}, stream=stream)
        torch.cuda.synchronize()
        host = torch.from_numpy(image).pin_memory()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # tens of milliseconds, which the inference has to wait
            source.copy_(host, non_blocking=True)
            session.run({"image": source}, outputs={"logits": target}, stream=stream)
            copied = target.clone()
            source.zero_()  # after the inference has read it
        stream.synchronize()
        return copied.cpu().numpy(), expected

    return run


@pytest.fixture(scope="session")
def served_wrongly():
    """Return which of eight threads that share a session got a wrong answer."""

    def serve_all(whole, shared):
        generator = np.random.default_rng(2)
        images = [generator.standard_normal((1, 3, 32, 32)).astype(np.float32) for _ in range(8)]
        expected = [whole.run({"image": image})["logits"] for image in images]
        wrong = []

        def serve(number):
            for _ in range(50):
                found = shared.run({"image": images[number]})["logits"]
                if relative_error(found, expected[number]) > LIMITS["fp32"].relative_error:
                    wrong.append(number)

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    return serve_all
