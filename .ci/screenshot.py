"""Take the screenshots of the README: the demo in a monitor of its own, light and dark, into `.docs/`.

    .venv/bin/python .ci/screenshot.py [DIRECTORY]

Needs what the tests need (`python3 test_monitor.py --setup`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import playwright.sync_api
import setup

SIZE: playwright.sync_api.ViewportSize = {"width": 1440, "height": 740}
# A session that waits for an answer, and a command of it that failed.
SESSION = "[data-testid=session]:has-text('Quote what was typed')"
ROW = "[data-testid=row]:has-text('failed')"


def main(folder: str) -> None:
    """Start a monitor, play the demo's past into it, and take a picture in each colour scheme."""
    with tempfile.TemporaryDirectory(prefix="ctx-", dir="/tmp") as home:
        with open(f"{home}/monitor.config.json", "w", encoding="utf-8") as file:
            json.dump({"socketPath": f"{home}/m.sock", "server": {"port": 0, "wsPort": 0}}, file)
        environment = {**os.environ, "CONTEXTUATE_HOME": home}

        def run(*arguments: str) -> str:
            command = [sys.executable, f"{setup.ROOT}/contextuate_monitor.py", *arguments]
            return subprocess.check_output(command, env=environment, text=True)

        run("start", "--no-open")
        try:
            run("demo", "--live", "0")
            take_pictures(run("url").strip(), folder)
        finally:
            run("stop")


def take_pictures(url: str, folder: str) -> None:
    """Save `screenshot-light.png` and `screenshot-dark.png`."""
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=setup.find_browser(), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            page.goto(url)
            page.get_by_text("Got it").click()  # the banner about the demo
            page.locator(SESSION).first.click()
            page.locator(ROW).first.click()
            page.wait_for_timeout(1000)  # transitions and the timeline's next frame
            page.screenshot(path=f"{folder}/screenshot-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else f"{setup.ROOT}/.docs")
