"""The pages in a browser: what `python tests/preview.py OUT` makes loads,
shows its figures and equations, and fits a phone"""
import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from preview import build

CHROMIUM, DRIVER = (shutil.which('chromium') or shutil.which('google-chrome'),
                    shutil.which('chromedriver'))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver on the PATH')
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--no-first-run')
LOOK = (
    "\nconst scrolls = e => e.tagName != 'MAIN' && "
    "(/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))\n"
    "const images = [...document.images], equations = [...document.querySelectorAll('math')]\n"
    "return {broken: images.filter(i => !i.complete || i.naturalWidth == 0)"
    ".map(i => i.src.slice(0, 80)), "
    "images: images.length, figures: document.querySelectorAll('figcaption').length,\n"
    "        equations: document.querySelectorAll('math[display=block]').length, "
    "flat: equations.filter(e => e.getBoundingClientRect().width == 0).length,\n"
    "        tex: equations.map(e => e.textContent).filter(t => /\\\\[a-zA-Z]/.test(t)), "
    """dangling: [...document.querySelectorAll('a[href^="#"]')]"""
    ".map(a => a.getAttribute('href').slice(1))"
    ".filter(id => id && !document.getElementById(decodeURIComponent(id))),\n"
    "        unlinked: [...document.querySelectorAll('main p, main li, main td')]"
    ".map(e => e.textContent)"
    ".filter(t => /\\]\\([^ )]*ipynb/.test(t)).map(t => t.slice(0, 80)),\n"
    "        overflow: document.documentElement.scrollWidth - window.innerWidth,\n"
    "        wide: [...document.querySelectorAll('main *')]"
    ".filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1"
    " && !scrolls(e)).map(e => e.tagName + ': ' + e.textContent.slice(0, 60))}\n")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def looks(prepared, tmp_path_factory):
    "What a browser says of each page, wide and as narrow as a phone"
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait
    out = tmp_path_factory.mktemp('site')
    broken = build(prepared, out)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS: options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=out)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
            found = {}
            browser.set_window_size(1280, 900)
            for path in sorted(prepared.rglob('*.ipynb')):
                name = path.relative_to(prepared).with_suffix('')
                browser.get(f'http://127.0.0.1:{server.server_port}/{name}.html')
                WebDriverWait(browser, 60).until(lambda b: b.execute_script(
                    "return document.readyState == 'complete' "
                    "&& [...document.images].every(i => i.complete)"))
                found[str(name)] = dict(wide=browser.execute_script(LOOK), title=browser.title,
                                        nb=json.loads(path.read_text()))
                browser.execute_cdp_cmd(
                    'Emulation.setDeviceMetricsOverride',
                    dict(width=390, height=844, deviceScaleFactor=1, mobile=True))
                found[str(name)]['phone'] = browser.execute_script(LOOK)
                browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
                found[str(name)]['errors'] = [
                    entry['message'] for entry in browser.get_log('browser')
                    if entry['level'] == 'SEVERE']
        server.shutdown()
    return broken, found


def links_lead_somewhere(broken, found):
    assert not broken
    assert not {name: look['wide']['dangling'] for name, look in found.items()
                if look['wide']['dangling']}
    # a name that nbdev links inside a link
    assert not {name: look['wide']['unlinked'] for name, look in found.items()
                if look['wide']['unlinked']}


def pages_load(broken, found):
    for name, look in found.items():
        assert look['title'] and not look['errors'], (name, look['errors'])


def figures_are_shown(broken, found):
    for name, look in found.items():
        pictures = sum('image/png' in o.get('data', {})
                       for c in look['nb']['cells'] for o in c.get('outputs', []))
        captions = sum('#| fig-cap' in ''.join(c['source'])
                       for c in look['nb']['cells'] if c['cell_type'] == 'code')
        assert not look['wide']['broken'], (name, look['wide']['broken'])
        assert look['wide']['images'] >= pictures and look['wide']['figures'] >= captions, name


def equations_are_shown(broken, found):
    for name, look in found.items():
        text = '\n'.join(''.join(c['source']) for c in look['nb']['cells']
                         if c['cell_type'] == 'markdown')
        assert look['wide']['equations'] >= len(re.findall(r'\$\$', text))//2, name
        assert not look['wide']['tex'] and not look['wide']['flat'], (
            name, look['wide']['tex'], look['wide']['flat'])


def pages_fit_a_phone(broken, found):
    "Nothing reaches beyond the screen but what can be scrolled by itself"
    for name, look in found.items():
        assert look['phone']['overflow'] <= 1 and not look['phone']['wide'], (
            name, look['phone']['wide'][:3])


@pytest.mark.slow
def test_pages_in_a_browser(looks):
    "All that is asked of them, in one test: a second process would look at every page again"
    checks = (links_lead_somewhere, pages_load, figures_are_shown, equations_are_shown,
              pages_fit_a_phone)
    wrong = []
    for check in checks:
        try: check(*looks)
        except AssertionError as e: wrong.append(f'{check.__name__}: {e}')
    assert not wrong, '\n'.join(wrong)
