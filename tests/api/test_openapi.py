"""GET /openapi.json: what it says is what is served."""

import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator

from sidecar.api import openapi, query
from sidecar.errors import Busy
from sidecar.record import FIELDS
from sidecar.settings import Reads as ReadSettings
from sidecar.settings import Settings
from sidecar.stores.base import Summary
from tests.api.door import open_door
from tests.parts.reads import ReadsStand


@pytest.fixture
async def document(tmp_path):
    """As served."""
    async with open_door(tmp_path, Settings(), query.routes(ReadsStand().reads)) as door:
        status, found, headers = await door.get("/openapi.json")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        return found


async def test_it_is_valid_openapi(document):
    """By the specification's own schema, references resolved."""
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


async def test_every_route_is_described_by_name_and_answers(document):
    """None is left undescribed; operation ids are unique."""
    operations = [
        (path, method, item[method])
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    ]
    assert [(p, m) for p, m, o in operations if o["summary"] == openapi.UNDESCRIBED] == []
    ids = [o["operationId"] for _, _, o in operations]
    assert len(set(ids)) == len(ids) == 12


async def test_a_route_without_words_shows_as_undescribed_and_words_without_a_route_do_not_show():
    """The document follows the router: this is what makes the test above able to fail."""

    async def handler(_request):
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/new/{thing}", handler), web.get("/status", handler)])
    found = openapi.document(app.router)["paths"]
    assert set(found) == {"/new/{thing}", "/status"}
    assert found["/new/{thing}"]["get"]["summary"] == openapi.UNDESCRIBED
    assert found["/status"]["get"]["operationId"] == "getStatus"


def test_the_schemas_are_the_fields_of_the_code():
    """Record and summary have the fields that are sent, in their order."""
    schemas = openapi.words()["components"]["schemas"]
    assert tuple(schemas["Record"]["properties"]) == FIELDS
    assert tuple(schemas["Record"]["required"]) == FIELDS
    assert set(schemas["Summary"]["properties"]) == set(Summary.__struct_fields__)


def test_the_bounds_are_the_defaults_of_the_settings():
    """Limit's maximum and default are those of the code."""
    limit = openapi.words()["components"]["parameters"]["Limit"]["schema"]
    assert (limit["maximum"], limit["default"]) == (ReadSettings().max_limit, 100)


async def test_the_headers_that_matter_to_programs_are_described(tmp_path):
    """What an answer says in its own headers stands in the words of that answer."""
    async with open_door(tmp_path, Settings()) as door:
        found = openapi.words()
        record = {"service_name": "s"}
        unknown = "/logs/01a22967-d56a-7325-83f8-1029eababf70"
        answers = [
            ("/logs", "post", await door.post(record, {"Prefer": "wait=0"})),
            ("/logs", "post", await door.post([record, {}], {"Prefer": "wait=0"})),
            ("/logs/{log_id}", "get", await door.get(unknown)),
        ]
        door.closed = Busy("fail_closed", "closed by the test", 1)
        answers.append(("/logs", "post", await door.post(record)))
        for path, method, (status, _, headers) in answers:
            described = openapi_headers(found, found["paths"][path][method]["responses"][str(status)])
            own = {n for n in headers if n.startswith("X-") or n in ("Preference-Applied", "Retry-After")}
            assert own
            assert own <= described, (path, status)


def openapi_headers(document, answer):
    """Names of the headers that the words of an answer have."""
    if "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    return set(answer.get("headers", {}))
