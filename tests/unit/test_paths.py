"""Which endpoint answers a path."""

import pytest

from farflung.net.server import Paths


async def _answer(request):
    raise NotImplementedError


@pytest.fixture
def paths() -> Paths:
    known = Paths()
    for method, path in (
        ("GET", "/v1"),
        ("POST", "/v1/nodes"),
        ("GET", "/v1/runs/{run}"),
        ("POST", "/v1/runs/{run}/leases"),
        ("POST", "/v1/runs/{run}/leases/{lease}/submission"),
        ("GET", "/v1/runs/{run}/submissions/{digest}"),
        ("GET", "/v1/runs/{run}/submissions/{digest}/logp"),
    ):
        known.add(method, path, _answer)
    return known


@pytest.mark.parametrize(
    ("method", "path", "names"),
    [
        ("GET", "/v1", {}),
        ("POST", "/v1/nodes", {}),
        ("GET", "/v1/runs/demo", {"run": "demo"}),
        ("POST", "/v1/runs/demo/leases/l1/submission", {"run": "demo", "lease": "l1"}),
        ("GET", "/v1/runs/a b/submissions/{}", {"run": "a b", "digest": "{}"}),
        ("GET", "/v1/runs/demo/submissions/d/logp", {"run": "demo", "digest": "d"}),
    ],
)
def test_a_path_is_found_with_what_it_names(paths, method, path, names) -> None:
    assert paths.find(method, path) == (_answer, names)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1"),
        ("HEAD", "/v1"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "/v1/"),
        ("GET", "/v1/runs/"),
        ("GET", "/v1/runs"),
        ("GET", "/v1/runs/demo/"),
        ("POST", "/v1/runs//leases"),
        ("POST", "/v1/runs/demo/leases/l1"),
        ("POST", "/v1/runs/demo/leases/l1/submission/more"),
    ],
)
def test_what_is_no_route_is_left_to_others(paths, method, path) -> None:
    assert paths.find(method, path) is None
