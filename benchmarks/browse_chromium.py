"""Visitors with a browser: how the table of all latents scrolls and sorts, and many people who look at features at once.

Times are taken within the page, from when it was asked for or a key was pressed until everything is drawn; frames by requestAnimationFrame.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.browse_server import Served
from benchmarks.options import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 120_000
SIZE = {"width": 1400, "height": 900}
PROBES_404 = (
    "/_stcore/health",
    "/_stcore/host-config",
)  # Streamlit's page looks for the server's root below its own address first

# A feature is there when the script has ended, the heading is another one than before, and contexts and figures are drawn.
IN_PAGE = """
addEventListener("keydown", () => { window.sbAsked = performance.now(); }, true);
window.sbReady = (before, ready) => new Promise((resolve) => {
  const title = () => document.querySelector(".sb-title span")?.textContent ?? "";
  const check = () => {
    const done = document.querySelector("[data-testid=stApp]")?.dataset.testScriptState === "notRunning"
      && title() && title() !== before && ready();
    if (done) requestAnimationFrame(() => setTimeout(() => resolve([performance.now(), title()])));
    else setTimeout(check, 10);
  };
  check();
});
window.sbFeature = (before) => sbReady(before, () => document.querySelector(".sb-rows .sb-row, .sb-empty")
  && document.querySelectorAll(".js-plotly-plot .main-svg").length);
window.sbTable = () => sbReady(null, () => document.querySelector(".sb-grid-row"));
window.sbProblems = () => [...document.querySelectorAll(".sb-problem, [data-testid=stException], [data-testid=stAlert]")]
  .map((box) => box.textContent);
window.sbFrames = (work) => new Promise((resolve) => {
  const gaps = [];
  let last = performance.now(), ended = false;
  const frame = () => {
    const now = performance.now();
    gaps.push(now - last);
    last = now;
    if (ended) resolve(gaps); else requestAnimationFrame(frame);
  };
  requestAnimationFrame(() => { last = performance.now(); requestAnimationFrame(frame); work().then(() => { ended = true; }); });
});
window.sbLater = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
"""
DRAG = """() => sbFrames(async () => {
  const box = document.querySelector(".sb-grid"), end = box.scrollHeight - box.clientHeight;
  for (let i = 0; i <= 120; i++) {
    box.scrollTop = end * (0.5 - 0.5 * Math.cos(i / 120 * 4 * Math.PI));
    await new Promise(requestAnimationFrame);
  }
})"""
SORT = """(number) => {
  const first = () => document.querySelector(".sb-grid-row").textContent;
  let asked, shown;
  return sbFrames(async () => {
    asked = performance.now();
    document.querySelectorAll(".sb-grid-head button")[number].click();
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    shown = performance.now();
    await sbLater(1500);
  }).then((gaps) => [Math.max(...gaps), shown - asked, first()]);
}"""


def executable() -> str:
    """Raises UsageError where there is no browser."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise UsageError(
            f"no browser found: install Debian's chromium, or one of {', '.join(NAMES)}; or leave chromium out of --parts"
        )
    return found


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        raise UsageError("playwright is missing: pip install 'saebench[dev]', or leave chromium out of --parts") from None
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield browser
        await browser.close()


async def version() -> str:
    async with chromium() as browser:
        return browser.version


async def _visitor(browser: Any, problems: list[str]) -> Any:
    """A page of a visitor of its own; what goes wrong in it is collected."""
    context = await browser.new_context(viewport=SIZE)
    page = await context.new_page()
    page.set_default_timeout(WAIT_MS)
    await page.add_init_script(IN_PAGE)
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("console", lambda message: _said(message, problems))
    return page


def _said(message: Any, problems: list[str]) -> None:
    if message.type == "error" and not message.location.get("url", "").endswith(PROBES_404):
        problems.append(f"console: {message.text}")


# --- the table ---


async def table(server: Served, *, run: str, dictionary: str) -> dict:
    """Milliseconds: until the table is drawn, longest gaps between frames while it is scrolled and sorted by each column, and until a
    filter that was typed shows."""
    problems: list[str] = []
    found: dict = {"problems": problems, "sorts": {}}
    async with chromium() as browser:
        page = await _visitor(browser, problems)
        address = server.address("features", run=run, dictionary=dictionary)
        for name in ("load_ms", "load_again_ms"):
            await page.goto(address, wait_until="commit")
            found[name] = (await page.evaluate("sbTable()"))[0]
        found["rows"] = int(await page.get_attribute(".sb-grid", "aria-rowcount"))
        await page.hover(".sb-grid")
        idle = await page.evaluate("() => sbFrames(() => sbLater(1000))")
        found["idle"] = gaps(idle)
        watching = asyncio.ensure_future(page.evaluate("() => sbFrames(() => sbLater(3000))"))
        await asyncio.sleep(0.1)
        for number in range(80):
            await page.mouse.wheel(0, 100 + 40 * number)
            await asyncio.sleep(0.02)
        found["wheel"] = gaps(await watching)
        found["drag"] = gaps(await page.evaluate(DRAG))
        heads = await page.eval_on_selector_all(".sb-grid-head button", "all => all.map((one) => one.textContent)")
        for number, head in enumerate(heads):
            found["sorts"][head] = []
            for _ in range(2):  # both ways
                longest, shown, first = await page.evaluate(SORT, number)
                found["sorts"][head].append({"longest_ms": longest, "shown_ms": shown, "first": first})
        found["filter_ms"] = await _filtered(page)
        problems += await page.evaluate("sbProblems()")
    return found


async def _filtered(page: Any) -> float:
    """Milliseconds from Enter until the table has other rows."""
    box = page.get_by_label("Strongest token")
    await box.fill("def")
    rows = await page.get_attribute(".sb-grid", "aria-rowcount")
    await box.press("Enter")
    done = await page.evaluate(
        "(rows) => sbReady(null, () => (document.querySelector('.sb-grid')?.ariaRowCount ?? rows) !== rows"
        " || document.querySelector('.sb-empty'))",
        rows,
    )
    return done[0] - await page.evaluate("sbAsked")


def gaps(found: list[float]) -> dict:
    """The longest of the gaps between frames, how many there were, and how many were longer than two frames of 60 a second."""
    return {"longest_ms": max(found), "frames": len(found), "late": sum(gap > 2000 / 60 for gap in found)}


# --- many visitors ---


async def visits(
    server: Served, latents: Sequence[int], *, run: str, dictionary: str, visitors: int, steps: int, pause: float, seed: int
) -> dict:
    """So many visitors, each with cookies, cache and connection of its own. One after the other opens a random feature; when all are there,
    each goes to the next by pressing N, `steps` in all, and looks at each for half to one and a half times `pause` seconds.

    They open one by one because a browser that has nothing of the app compiled yet takes some four seconds of processor for it: what many
    at once would measure is this machine's browsers. Returns seconds until a feature is drawn, problems, and when the walk began."""
    rng = random.Random(seed)
    problems: list[str] = []
    plans = [(rng.choice(latents), random.Random(rng.random())) for _ in range(visitors)]

    async def opened(browser: Any, latent: int) -> tuple[Any, dict]:
        page = await _visitor(browser, problems)
        await page.goto(server.address("feature", run=run, dictionary=dictionary, feature=latent), wait_until="commit")
        return page, await seen(page, "", first=True)

    async def seen(page: Any, before: str, first: bool = False) -> dict:
        done, title = await page.evaluate("(before) => sbFeature(before)", before)
        asked = 0 if first else await page.evaluate("sbAsked")
        problems.extend(await page.evaluate("sbProblems()"))
        return {"first": first, "complete": (done - asked) / 1e3, "shown": title}

    async def walk(page: Any, title: str, own: random.Random) -> list[dict]:
        made = []
        await asyncio.sleep(pause * own.random())
        for _ in range(steps):
            await page.keyboard.press("n")
            made.append(await seen(page, title))
            title = made[-1]["shown"]
            await asyncio.sleep(pause * own.uniform(0.5, 1.5))
        return made

    async with chromium() as browser:
        pages = [await opened(browser, latent) for latent, _ in plans]
        cpu, started = server.cpu_seconds(), time.perf_counter()
        walks = (walk(page, found["shown"], own) for (page, found), (_, own) in zip(pages, plans, strict=True))
        done = await asyncio.gather(*walks, return_exceptions=True)
        cpu, seconds = server.cpu_seconds() - cpu, time.perf_counter() - started
    problems += [f"{type(one).__name__}: {one}" for one in done if isinstance(one, BaseException)]
    made = [found for _, found in pages] + [visit for one in done if not isinstance(one, BaseException) for visit in one]
    return {"visits": made, "problems": problems, "cpu_seconds": cpu, "seconds": seconds}
