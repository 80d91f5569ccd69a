"The suite stays on this machine: what conftest.py forbids is forbidden"
import json
import socket
import subprocess
import sys
from urllib.request import urlopen

import pytest

OUTSIDE = '192.0.2.1' # belongs to no machine (RFC 5737)


def attempts():
    yield lambda: socket.create_connection((OUTSIDE, 80), timeout=1)
    yield lambda: socket.create_connection(('example.org', 80), timeout=1)
    yield lambda: socket.getaddrinfo('example.org', 80)
    yield lambda: socket.getaddrinfo(b'example.org', 80)
    yield lambda: socket.gethostbyname('example.org')
    yield lambda: socket.socket().connect_ex((OUTSIDE, 80))
    yield lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', (OUTSIDE, 53))
    yield lambda: socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))
    yield lambda: urlopen(f'http://{OUTSIDE}/', timeout=1)
    yield lambda: urlopen('https://example.org/', timeout=1)


@pytest.mark.parametrize('attempt', [*attempts()])
def test_no_way_out(attempt):
    with pytest.raises(pytest.fail.Exception, match='open no connection to another machine'):
        attempt()


def test_this_machine_may_be_reached():
    with socket.create_server(('127.0.0.1', 0)) as server:
        for host in ('127.0.0.1', 'localhost'):
            socket.create_connection((host, server.getsockname()[1]), timeout=5).close()


def test_subprocesses_find_no_way_out():
    "Those that heed these variables; a program that opens sockets by itself is not held back"
    script = '''
import json
from urllib.request import getproxies, urlopen
try: urlopen('http://example.org/', timeout=5)
except OSError as e: print(json.dumps([str(e), sorted(getproxies())]))'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    error, proxies = json.loads(done.stdout)
    assert 'refused' in error.lower() and {'http', 'https'} <= set(proxies), done.stderr
