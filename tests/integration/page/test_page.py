"""The status page in a real browser: what it shows, follows and does, and what it must never do."""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.integration.page.browser import look
from tests.parts.fault_proxy import Reset
from tests.parts.sidecar import ROOT, eventually
from tests.scenarios.test_operator import SECRET, TOKEN, account, allow, controlled, poisoned, sql
from tests.scenarios.test_write_path import post

HOSTILE = '"><img src=x onerror="window.harmed=1"><script>window.harmed=2</script>{{7*7}}'
AXE = ROOT / ".run" / "page-tools" / "node_modules" / "axe-core" / "axe.min.js"
LONG = re.compile(r"^M[^M]{30,}")  # a path of several samples
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


async def audit(http, sidecar):
    """The trail, newest first."""
    async with http.get(f"{sidecar.url}/api/control/audit", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        return (await answer.json())["audit"]


async def test_it_loads_alone_and_without_an_error(stand, browser):
    """No console message, no request but to the sidecar, no answer but 200; script, style and icon really came."""
    sidecar = await stand.sidecar(phase="dual_write").start()
    async with look(browser, sidecar.url) as seen:
        await seen.sees("#applied", "dual_write")
        await seen.sees("#problems-none", "Nothing")
        await expect(seen.page).to_have_title(
            "dual_write · " + (await seen.text("#instance"))[9:] + " · Hybrid log sidecar"
        )
        await expect(seen.page.locator("[aria-current=step]")).to_have_text(
            "1 dual_write · applied and desiredwrites both, reads PostgreSQL"
        )
        for store in ("postgres", "dynamodb"):
            await seen.sees(f"#stores tr[data-key={store}]", "up")
        await expect(seen.page.locator("svg.plot")).to_have_count(4)
        paths = {each.removeprefix(f"GET {sidecar.url}") for each in seen.asked}
        assert {"/", "/page/status.css", "/page/main.js", "/page/icon.svg", "/status", "/openapi.json"} <= paths
        assert seen.outside(sidecar.url) == []
        assert [answer.url for answer in seen.got if answer.status != 200] == []
        colour = await seen.page.evaluate("getComputedStyle(document.querySelector('section')).borderTopWidth")
        assert colour == "1px", "the style sheet is in force"
        await seen.page.reload()
        await seen.sees("#applied", "dual_write")
        assert seen.errors == []


async def test_it_follows_the_phase_and_says_what_holds_it(stand, browser):
    """A mounted change shows by itself: applied, desired, the gate that holds with evidence, the transition."""
    sidecar = await stand.sidecar(phase="dual_write").start()
    async with look(browser, sidecar.url) as seen:
        sidecar.configure(phase="sql_only")
        await seen.sees("#applied", "sql_only")
        await seen.sees("#announce", "Applied phase: sql_only")
        await seen.sees("#history tbody tr:first-child", "dual_write")
        await seen.sees("#f-dynamodb", "no")
        sidecar.configure(phase="dynamo_only")
        await seen.sees("#desired", "dynamo_only")
        held = seen.page.locator("#gates tr", has_text="adjacent_step")
        await expect(held).to_contain_text("red")
        await expect(held).to_contain_text("sql_only to dynamo_only, 3 steps")
        await expect(held).to_contain_text("one step at a time")
        await seen.sees("#problem-list", "held by adjacent_step")
        await seen.sees("#applied", "sql_only")
        assert seen.errors == []


async def test_it_shows_a_store_going_down_and_coming_back(stand, browser, http):
    """Down with its reason and what waits for it, while the other delivers; then up, and nothing waits."""
    sidecar = await stand.sidecar(phase="dual_write").start()
    async with look(browser, sidecar.url) as seen:
        stand.dynamo.on("*", Reset())
        await post(http, sidecar, [{"service_name": "s"}] * 40)
        await seen.sees("#stores tr[data-key=dynamodb]", "down")
        await seen.sees("#stores tr[data-key=dynamodb] td:nth-of-type(2)", "40")
        await seen.sees("#stores tr[data-key=postgres]", "up")
        await seen.sees("#problem-list", "dynamodb is down")
        await seen.sees("#announce", "dynamodb is down")
        await seen.sees("#divergence", "40")
        stand.dynamo.clear()
        await seen.sees("#announce", "dynamodb is up")
        await seen.sees("#problems-none", "Nothing")
        await expect(seen.page.locator("#problem-list li")).to_have_count(0)
        plot = seen.page.locator("figure[data-plot=pending] svg")
        assert "dynamodb 0" in await plot.get_attribute("aria-label")
        assert "peak 40" in await plot.get_attribute("aria-label")
        assert len(await plot.locator("path.dynamodb").get_attribute("d")) > 20
        assert seen.errors == []


async def test_it_says_why_records_wait_for_a_store_that_is_up(stand, browser, http):
    """The gap ledger beside PostgreSQL's table is gone: red, with the reason, told once; then up again."""
    sidecar = await stand.sidecar(phase="sql_only").start()
    async with look(browser, sidecar.url) as seen:
        await sql(stand, "ALTER TABLE integration_logs_gaps RENAME TO moved")
        await post(http, sidecar, [{"service_name": "s"}])
        state = seen.page.locator("#stores tr[data-key=postgres]")
        await expect(state).to_contain_text("waiting: its records wait for a line in the gap ledger: postgres")
        await expect(state.locator(".bad")).to_have_count(1)
        await seen.sees("#problem-list", "postgres is waiting: its records wait for a line in the gap ledger")
        await expect(seen.page.locator("#problem-list li")).to_have_count(1)
        await sql(stand, "ALTER TABLE moved RENAME TO integration_logs_gaps")
        await seen.sees("#announce", "postgres is up")
        await seen.sees("#problems-none", "Nothing")
        assert seen.errors == []


async def test_it_redrives_a_dead_letter_with_the_token_and_without_its_record(stand, browser, http):
    """By keyboard alone: a wrong token is told, the right one lists and redrives; the trail has it; no payload came."""
    sidecar = await controlled(stand).start()
    ids = await poisoned(stand, http, sidecar, "bad1", "bad2")
    async with look(browser, sidecar.url) as seen:
        await seen.sees("#dead", "permanent")
        await seen.sees("#problem-list", "Dead letters that wait for a decision: 2")
        assert seen.errors == []
        page = seen.page
        await page.get_by_label("Control token").first.focus()
        await page.keyboard.type("not the token")
        await page.keyboard.press("Enter")
        await seen.sees("#show-error", "token is needed")
        await page.keyboard.press("Control+A")
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await seen.sees("#show-error", "Not listed: Authorization")
        await page.keyboard.press("Control+A")
        await page.keyboard.type(TOKEN)
        await page.keyboard.press("Enter")
        await seen.sees("#letters", ids["bad1"])
        await seen.sees("#letters", "23514")

        await allow(stand, "bad1")
        one = page.get_by_role("button", name=f"Redrive {ids['bad1']} for postgres")
        await one.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog", name="Try again")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_have_count(0)
        await expect(one).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Reason, for the audit trail")).to_be_focused()
        await page.keyboard.type(f"mended {HOSTILE}")
        await page.keyboard.press("Enter")
        await seen.sees("#letters-said", "1 handed to delivery again")
        await expect(page.locator("#letters")).not_to_contain_text(ids["bad1"])
        await eventually(lambda: delivered(sidecar, 31), what="one delivered")

        await allow(stand, "bad2")
        await page.get_by_role("button", name="Redrive all 1 of class permanent for postgres").click()
        await page.get_by_label("Reason, for the audit trail").fill("mended")
        await page.get_by_role("button", name="Redrive", exact=True).click()
        await seen.sees("#dead-none", "None")
        await eventually(lambda: delivered(sidecar, 32), what="both delivered")
        assert (await account(sidecar))["dead_lettered"] == 0

        text = await page.content() + await seen.bodies()
        assert SECRET not in text
        assert TOKEN not in await page.content()
        assert await page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert await page.locator("#token").input_value() == "", "with the last letter the token is forgotten"
    whos = [(line["who"], line["why"]) for line in await audit(http, sidecar) if line["what"] == "redrive"]
    assert sorted(why for _, why in whos) == ["mended", f"mended {HOSTILE}"]
    assert all("as status page" in who for who, _ in whos)
    assert set(await stand.in_postgres()) >= set(ids.values())


async def delivered(sidecar, records):
    """Whether PostgreSQL has that many."""
    return (await account(sidecar))["delivered"] == records


async def test_a_hostile_name_and_reason_are_text(stand, browser):
    """An instance called like markup, a force reason that is markup: shown letter by letter, nothing of it runs."""
    sidecar = await stand.sidecar(phase="sql_only", instance=HOSTILE[:60]).start()
    async with look(browser, sidecar.url) as seen:
        sidecar.configure(phase="dynamo_only", phase_force=HOSTILE)
        await seen.sees("#applied", "dynamo_only")
        await seen.sees("#history", HOSTILE)
        await seen.sees("#problem-list", f"forced by configuration: {HOSTILE}")
        assert await seen.text("#instance") == f"instance {HOSTILE[:60]}"
        assert await seen.page.evaluate("window.harmed") is None
        assert await seen.page.locator("img, main script, iframe").count() == 0
        assert seen.errors == []
        blocked = await seen.page.evaluate(
            "(text) => { try { document.body.innerHTML = text; return 'taken' } catch (e) { return e.name } }", HOSTILE
        )
        assert blocked == "TypeError", "the policy lets nobody parse markup"


async def test_it_says_that_the_sidecar_is_away_and_goes_on_when_it_is_back(stand, browser):
    """Killed and started again: what stands there is marked as old, then as fresh, without a reload."""
    sidecar = await stand.sidecar(phase="dual_write").start()
    async with look(browser, sidecar.url) as seen:
        sidecar.kill()
        await seen.sees("#problem-list", "does not answer (no connection)")
        await seen.sees("#fresh", "No answer since")
        await sidecar.start()
        await seen.sees("#announce", "answers again")
        await expect(seen.page.locator("#problem-list li")).to_have_count(0)
        assert [error for error in seen.errors if "ERR_CONNECTION" not in error] == []


async def test_paused_updates_ask_nothing(stand, browser):
    """The button stops the page from asking, and lets it ask again at once; it is told as pressed."""
    sidecar = await stand.sidecar(phase="dual_write").start()
    async with look(browser, sidecar.url) as seen:
        pause = seen.page.get_by_role("button", name="Pause updates")
        await pause.click()
        await expect(pause).to_have_attribute("aria-pressed", "true")
        sidecar.configure(phase="sql_only")
        await eventually(lambda: applied(sidecar, "sql_only"), what="applied")
        before = len(seen.asked)
        await asyncio.sleep(2.5)  # more than one period
        assert len(seen.asked) - before <= 1, "at most the one that was under way"
        assert await seen.text("#applied") == "dual_write"
        await pause.click()
        await seen.sees("#applied", "sql_only")


async def applied(sidecar, phase):
    """Whether it is applied."""
    return (await sidecar.json("/status"))["phase"]["applied"] == phase


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_accessible_in_both_colours_with_everything_on_it(stand, browser, http, scheme, tmp_path):
    """Axe finds nothing against WCAG 2.2 AA, contrast included, while a store is down and letters are dead."""
    assert AXE.exists(), "axe-core is missing: run tests/integration/page/install"
    fleet = {"enabled": True, "heartbeat": "300ms", "fence_after": "60s"}
    quiet = {"interval": 0, "settle": "1s"}
    sidecar = controlled(stand, phase="dual_write", fleet=fleet, instance="checkout-7d9c-x2x1v", validation=quiet)
    await sidecar.start()
    await poisoned(stand, http, sidecar, "bad1", good=300)
    async with http.get(f"{sidecar.url}/api/migration/validate-consistency") as answer:
        assert (await answer.json())["outcome"] == "divergent", "the dead letter is a difference"
    writing = asyncio.create_task(write(http, sidecar))
    try:
        async with look(browser, sidecar.url, color_scheme=scheme, reduced_motion="reduce") as seen:
            await seen.page.keyboard.press("Tab")
            await expect(seen.page.get_by_role("link", name="Skip to the state")).to_be_focused()
            await seen.page.get_by_label("Control token").first.fill(TOKEN)
            await seen.page.get_by_role("button", name="List them").click()
            await seen.sees("#letters", "23514")
            await expect(seen.page.locator("figure[data-plot=owed] path.postgres")).to_have_attribute("d", LONG)
            sidecar.configure(phase="dual_write_read_dynamo")
            await seen.sees("#gates", "days_validated")
            stand.dynamo.on("BatchWriteItem", Reset())
            await seen.sees("#stores tr[data-key=dynamodb]", "down")
            await seen.sees("#fleet", "checkout-7d9c-x2x1v")
            await seen.page.locator("#h-stores").scroll_into_view_if_needed()
            picture = tmp_path / f"status-{scheme}.png"
            await seen.page.screenshot(path=picture, full_page=True)
            if "PICTURES" in os.environ:
                shutil.copy(picture, Path(os.environ["PICTURES"]) / picture.name)
            background = await seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == {"light": "rgb(246, 248, 250)", "dark": "rgb(13, 17, 23)"}[scheme]
            assert seen.errors == []
            await seen.page.evaluate(AXE.read_text())
            for opened in (False, True):
                if opened:
                    await seen.page.get_by_role("button", name="Redrive all").first.click()
                found = await seen.page.evaluate(
                    "(rules) => axe.run({runOnly: rules, resultTypes: ['violations']})", RULES
                )
                said = [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]]
                assert said == [], json.dumps(said, indent=1)
                assert len(found["passes"]) > 15
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def write(http, sidecar):
    """A little traffic, so that the plots have lines."""
    number = 0
    while True:
        number += 1
        await post(http, sidecar, [{"service_name": "checkout"}] * (3 + number % 7))
        await asyncio.sleep(0.2)


async def test_it_shows_a_fleet_of_two_and_every_gate_with_its_evidence(stand, browser):
    """Both instances, one with a hostile name; who disagrees; then the gates of 1 to 2 with evidence, red and green."""
    fleet = {"enabled": True, "heartbeat": "500ms", "fence_after": "15s"}
    first = await stand.sidecar("first", phase="sql_only", fleet=fleet, instance="checkout-a").start()
    second = await stand.sidecar("second", phase="sql_only", fleet=fleet, instance=HOSTILE[:60]).start()
    async with look(browser, first.url) as seen, look(browser, second.url) as other:

        async def gates_say(*rows: str) -> None:
            """On the page of the one that leads, which on a busy machine may pass from one to the other."""

            async def said() -> bool:
                for each in (seen, other):
                    text = await each.page.locator("#gates").inner_text()
                    if all(row in text for row in rows):
                        return True
                return False

            await eventually(said, seconds=90, every=0.2, what=f"gates {rows}")

        await seen.sees("#fleet-facts", "sql_only, epoch")
        await seen.sees("#fleet", "checkout-a")
        await seen.sees("#fleet", HOSTILE[:60])
        await expect(seen.page.locator("#fleet tbody tr", has_text="live")).to_have_count(2)
        first.configure(phase="dual_write")
        for page in (seen, other):  # also of the one that does not lead
            await page.sees("#gates", "configurations_agree")
            await page.sees("#problem-list", "configurations_agree")
        told = [await page.text("#gates-none") for page in (seen, other)]
        assert sum("leads the fleet and looks at the gates: this is what it says" in each for each in told) == 1, told
        second.configure(phase="dual_write")
        await seen.sees("#applied", "dual_write")
        await seen.sees("#history tbody tr:first-child", "dual_write")
        for sidecar in (first, second):
            sidecar.configure(phase="dual_write_read_dynamo")
        await gates_say("days_validated", "red", "green")
        for page in (seen, other):
            await page.sees("#gates", "days_validated")
        await seen.sees("#desired", "dual_write_read_dynamo")
        await seen.sees("#applied", "dual_write")
        twin = stand.sidecar("third", phase="dual_write_read_dynamo", fleet=fleet, instance="checkout-a")
        await twin.start()

        async def told() -> bool:
            texts = [await each.page.locator("#problem-list").inner_text() for each in (seen, other)]
            return any("More than one process bears the name checkout-a" in text for text in texts)

        await eventually(told, seconds=90, every=0.2, what="the shared name")
        assert await seen.page.evaluate("window.harmed") is None
        assert await seen.page.locator("img, main script").count() == 0
        assert seen.errors == []
    assert second.process.poll() is None


async def test_it_shows_what_the_last_validation_found(stand, browser, http):
    """None yet; then clean, over how many; then a changed row as a difference, by reason and without its values."""
    sidecar = await stand.sidecar(phase="dual_write", validation={"interval": 0}).start()
    async with look(browser, sidecar.url) as seen:
        await seen.sees("#validation-none", "No validation has been finished yet")
        await post(http, sidecar, [{"service_name": "s", "user_id": SECRET}] * 7)
        await sidecar.drained()
        for outcome, found in (("clean", "no difference"), ("divergent", "field_mismatch")):
            async with http.get(f"{sidecar.url}/api/migration/validate-consistency?deep=true") as answer:
                assert (await answer.json())["outcome"] == outcome
            pause = seen.page.get_by_role("button", name="Pause updates")
            await pause.click()
            await pause.click()  # looks at once
            await seen.sees("#validation", outcome)
            await seen.sees("#validation", found)
            await seen.sees("#validation", "7 in PostgreSQL")
            await sql(stand, "UPDATE integration_logs SET user_id = 'somebody else'")
        assert SECRET not in await seen.page.content() + await seen.bodies()
        assert seen.errors == []
