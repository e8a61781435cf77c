"""Pictures of the tab "EMS" in a real WebUI: `WEBUI_PATH=... make_pictures.py FOLDER`.

Before, during and after a computation, in a page that is opened during it, and with a mistake in the form; in both
themes and in two widths. Forge has the embedded model in it, and docs/webui-ems-tab.png is its FOLDER/after-light-1400.png;
AUTOMATIC1111 has a larger one of random weights, for which as little as can be is computed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from webui_server import TREES, WebUI, browser_page, compute, show, wait_for

WIDTHS = (820, 1400)
DARK = "on => { for (const e of [document.body, document.documentElement]) e.classList.toggle('dark', on) }"


def keep(page: Any, state: str, folder: Path) -> None:
    """The page in both themes and widths."""
    for theme in ("dark", "light"):
        page.evaluate(DARK, theme == "dark")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(1500)  # gradio moves its parts after a change of the width
            page.locator("#tabs").screenshot(path=str(folder / f"{state}-{theme}-{width}.png"))


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        webui = WebUI(TREES[0], Path(base) / "webui", ("emoji",), pack="embedded")
        size: dict[str, Any] = {"pixels": 256, "scales": "1, 7"} if webui.forge else {"pixels": 64, "scales": "7"}
        try:
            webui.start()
            with browser_page(webui) as page:
                page.wait_for_timeout(2000)
                keep(page, "before", folder)
                # Longer than the pictures of it take, on a busy machine too; then it is interrupted.
                compute(page, " left", name="long", effort="standard", **size)
                keep(page, "during", folder)
                opened = page.context.browser.new_page()
                opened.set_default_timeout(240_000)
                show(opened, webui)
                wait_for(opened, " left")
                keep(opened, "reopened", folder)
                opened.close()
                page.locator("#dpm_solver_v3_interrupt").first.click()
                wait_for(page, "Stopped.")
                page.locator("#dpm_solver_v3_compute:enabled").first.wait_for()
                if not webui.forge:
                    page.locator("#dpm_solver_v3_steps").locator("textarea, input").first.fill("6")
                print(compute(page, "Done:", effort="quick", **size))
                page.wait_for_timeout(2000)
                keep(page, "after", folder)
                page.locator("details.dpmv3 summary").first.click()
                keep(page, "curves", folder)
                page.locator("#dpm_solver_v3_scales").locator("textarea, input").first.fill("1, x")
                page.locator("#dpm_solver_v3_compute").click()
                wait_for(page, "Error")
                keep(page, "mistake", folder)
        finally:
            webui.stop()


if __name__ == "__main__":
    main()
