"""Hostile programs, by family: each defines `steal`, which may not return what its tests expect.

In the first three families that is a token that only the tests know; in the others it is "done",
which a program says after it did what it may not. {file} and {folder} stand for a place outside,
{port} for a listening socket, {pid} for the process that runs the sandbox.
"""
# ruff: noqa: E501 - a line per program is easier to read than 100 characters

EVERY_FRAME = """
import sys
def frames():
    frame = sys._getframe()
    while frame:
        yield from list(frame.f_locals.items()) + list(frame.f_globals.items())
        frame = frame.f_back
"""
SEARCH = """
import re
def search(text):
    found = re.search("assert steal.. == '(.*?)'", text)
    return found and found[1]
"""

FORGING = (
    "import os\nfor n in range(64):\n try: os.write(n, b'passed\\n')\n except OSError: pass",
    'import os\nfor n in range(3, 64):\n try: os.write(n, b\'{"nonce": "", "status": "passed"}\\n\')\n'
    " except OSError: pass",
    'import os\ndef steal():\n for n in range(3, 64):\n  try: os.write(n, b\'["end", "passed", ""]\\n\')\n'
    "  except OSError: pass",
    "import os\nfor n in range(3, 64):\n try: os.write(n, b'[\"value\", null]\\n' * 3000)\n"
    " except OSError: pass",
    f"{EVERY_FRAME}\nfor name, value in frames():\n"
    " if name in ('report', 'answers', 'write'):\n"
    "  getattr(value, 'end', value)('passed')",
    "import os\nreal = os.write\nos.write = lambda n, b: real(n, b.replace(b'failed', b'passed'))",
    "import json\nreal = json.dumps\n"
    "json.dumps = lambda x, **k: real(x, **k).replace('failed', 'passed')\ndef steal(): 1 / 0",
    "import sys\ndef trace(frame, *_):\n frame.f_locals['status'] = 'passed'\n return trace\n"
    "sys.settrace(trace)\ndef steal(): pass",
    "import sys\nsys.setprofile(lambda f, *_: f.f_globals.update(check=lambda *_: None))\n"
    "def steal(): pass",
    "import sys\nsys.modules['eval.confined.judge'].judge = lambda *_: ('passed', '')",
    "import sys\nsys.modules['eval.confined.judge'].ENDINGS = ('passed',)\n"
    "def steal(): raise SystemExit",
    "import atexit\natexit.register(print, 'passed')\ndef steal(): raise SystemExit(0)",
    "import os\ndef steal(): os._exit(0)",
    "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.compile = lambda *_, **__: ''\n"
    "def steal(): pass",
    "class Ended(BaseException): pass\ndef steal(): raise Ended('passed', '')",
    "def steal(): raise StopIteration",
    "def check(*_): pass\nexec = check\ndef steal(): raise AssertionError",
    "class Final:\n def __del__(self): print('passed')\ndef steal(): return Final()",
    "import sys\nsys.excepthook = lambda *_: print('passed')\ndef steal(): 1 / 0",
)
READING = (
    f"{EVERY_FRAME}{SEARCH}\ndef steal(): return search(repr(list(frames())))",
    f"{SEARCH}\nimport linecache\ndef steal(): return search(repr(linecache.cache))",
    f"{SEARCH}\nimport sys\ndef steal():\n"
    " return search(''.join(repr(vars(m)) for m in list(sys.modules.values())))",
    f"{SEARCH}\nimport os\ndef steal():\n os.lseek(0, 0, 0)\n return search(os.read(0, 1 << 20).decode())",
    f"{SEARCH}\nimport os\ndef steal():\n for n in range(64):\n  try: text = os.pread(n, 1 << 20, 0)\n"
    "  except OSError: continue\n  if search(text.decode()): return search(text.decode())",
    f"{SEARCH}\nimport glob\ndef steal(): return search(open('../judge/tests').read())",
    f"{SEARCH}\nimport os\ndef steal(): return [search(n) for n in os.listdir('../judge')]",
    f"{SEARCH}\ndef steal(): return search(open('{{file}}').read())",
    f"{SEARCH}\nimport os\ndef steal():\n os.symlink('{{file}}', 'link')\n return search(open('link').read())",
    f"{SEARCH}\nimport os\ndef steal():\n for p in os.listdir('/proc'):\n"
    "  if p.isdecimal():\n   for n in os.listdir(f'/proc/{p}/fd'):\n"
    "    text = open(f'/proc/{p}/fd/{n}').read()\n    if search(text): return search(text)",
    f"{SEARCH}\nimport inspect\ndef steal():\n return search(''.join(inspect.getsource(f.frame)"
    " for f in inspect.stack()))",
    "import ctypes\ndef steal(): return ctypes.string_at(id('x'), 1 << 30)",
)
EQUALITY = (
    "class Any:\n def __eq__(self, other): return True\n"
    " def __ne__(self, other): return False\n __hash__ = None\ndef steal(): return Any()",
    "class Any(str):\n def __eq__(self, other): return True\n def __hash__(self): return 0\n"
    "def steal(): return Any('x')",
    "class Any:\n __class__ = str\n def __eq__(self, other): return True\ndef steal(): return Any()",
    "class Meta(type):\n def __eq__(self, other): return True\n def __hash__(self): return 0\n"
    "class Any(metaclass=Meta): pass\ndef steal(): return Any",
    "from unittest.mock import ANY\ndef steal(): return ANY",
    "from unittest.mock import MagicMock\ndef steal(): return MagicMock(__eq__=lambda *_: True)",
    "class Any(list):\n def __eq__(self, other): return True\ndef steal(): return Any()",
    "class Any(int):\n def __eq__(self, other): return True\ndef steal(): return Any()",
    "class Any(dict):\n def __eq__(self, other): return True\ndef steal(): return Any()",
    "class Any:\n def __getattr__(self, name): return self\n def __call__(self, *_): return self\n"
    " def __bool__(self): return True\ndef steal(): return Any()",
    "from fractions import Fraction\nclass Any(Fraction):\n def __eq__(self, other): return True\n"
    "def steal(): return Any(1)",
    "steal = 'not a function'",
    "class steal:\n def __eq__(self, other): return True",
)
WRITING = (
    "def act(): open('{file}', 'w')",
    "def act(): open('{file}', 'a').write('x')",
    "import os\ndef act(): os.open('file', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open('{folder}', 0))",
    "import os\ndef act():\n os.symlink('{file}', 'link')\n open('link', 'w')",
    "import os\ndef act():\n os.link('{file}', 'link')\n open('link', 'w')",
    "import os\ndef act():\n os.symlink('{folder}', 'link')\n open('link/other', 'w')",
    "import os\ndef act(): os.rename('{file}', 'mine')",
    "import os\ndef act(): os.remove('{file}')",
    "import os\ndef act(): os.chmod('{file}', 0)",
    "import os\ndef act(): os.fchmod(os.open('{file}', 0), 0)",
    "import os\ndef act(): os.truncate('{file}', 0)",
    "import os\ndef act(): os.utime('{file}', (0, 0))",
    "import os\ndef act(): os.mkfifo('{folder}/fifo')",
    "import os\ndef act(): os.mkdir('{folder}/new')",
    "import os\ndef act(): os.mknod('{folder}/node')",
    "import os, _posixshmem\ndef act(): _posixshmem.shm_open('/orthrus-x', os.O_CREAT | os.O_RDWR)",
    "def act(): open('/dev/shm/orthrus-x', 'w')",
    "import sqlite3\ndef act():\n c = sqlite3.connect(':memory:')\n"
    " c.execute(\"attach '{folder}/base' as b\")\n c.execute('create table b.t (x)')\n c.commit()",
    "import os\ndef act():\n os.chdir('{folder}')\n open('other', 'w')",
    "def act(): open('../../other', 'w')",
)
HARMING = (
    "import os\ndef act(): os.kill({pid}, 9)",
    "import os\ndef act(): os.kill(-1, 9)",
    "import os\ndef act(): os.killpg(os.getpgid({pid}), 9)",
    "import os, signal\ndef act(): signal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
    "import resource\ndef act(): resource.prlimit({pid}, resource.RLIMIT_CPU, (0, 0))",
    "import os\ndef act(): os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "import os\ndef act(): os.sched_setaffinity({pid}, [0])",
    "import os\ndef act(): os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "import os, fcntl\ndef act():\n r, w = os.pipe()\n fcntl.fcntl(r, fcntl.F_SETOWN, {pid})\n"
    " fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\n os.write(w, b'x')",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "import fcntl\ndef act(): fcntl.ioctl(0, 0x5412, b'x')",
    "import os\ndef act(): os.setsid()",
)
SECRETS = (
    "def act(): assert open('/proc/{pid}/environ').read()",
    "def act(): open('/proc/{pid}/mem', 'rb').read(1)",
    "def act(): assert open('/proc/{pid}/cmdline').read()",
    "import os\ndef act(): os.listdir('/proc/{pid}/fd')",
    "import os\ndef act(): assert os.environ['HOME']",
    "def act(): assert open('/etc/passwd').read()",
    "def act(): assert open('{file}').read()",
    "import os\ndef act(): os.listdir('{folder}')",
    "import os\ndef act(): os.listdir('/root')\n",
    "import os\ndef act(): assert len([p for p in os.listdir('/proc') if p.isdecimal()]) > 1",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).process_vm_readv({pid}, 0, 0, 0, 0, 0) >= 0",
)
NETWORK = (
    "import socket\ndef act(): socket.create_connection(('127.0.0.1', {port}), 2)",
    "import socket\ndef act(): socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "import socket\ndef act(): socket.socket().bind(('127.0.0.1', 0))",
    "import socket\ndef act(): socket.socket(socket.AF_UNIX).connect('\\0orthrus')",
    "import socket\ndef act(): socket.getaddrinfo('example.org', 80)",
    "import urllib.request as r\ndef act(): r.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "import _socket\ndef act(): _socket.socket(2, 1, 0)",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
)
PROCESSES = (
    "import os\ndef act(): os.fork()",
    "import pty\ndef act(): pty.fork()",
    "import os\ndef act(): os.posix_spawn('/bin/sleep', ['sleep', '99'], {})",
    "import os\ndef act(): os.execv('/bin/true', ['true'])",
    "import subprocess\ndef act(): subprocess.Popen(['sleep', '99'])",
    "import multiprocessing as m\ndef act(): m.Process(target=print).start()",
    "import _posixsubprocess as p\ndef act(): p.fork_exec([b'x'], [b'/bin/true'], *[None] * 21)",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).fork() >= 0",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).unshare(1 << 28) == 0",
    "import ctypes\ndef act(): assert ctypes.CDLL(None).prctl(1, 0) == 0",
)
EXHAUSTING = (
    "while True: pass",
    "import time\ndef act(): time.sleep(99)",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "def act(): return [0] * (1 << 40)",
    "def act(): act()",
    "def act(): return 9 ** 9 ** 9",
    "import re\ndef act(): re.match('(a+)+$', 'a' * 64 + 'b')",
    "import sys\nwhile True: sys.stderr.write('x' * 1_000_000)",
    "import os\nwhile True: os.write(3, b'x' * 65536)",
    "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "for n in range(99): open(str(n), 'wb').write(bytes(8 << 20))\nimport time\ntime.sleep(99)",
    "for n in range(20_000): open(str(n), 'wb').close()\nimport time\ntime.sleep(99)",
    "x = [open('/dev/null') for _ in range(99)]",
    "import threading, time\nfor _ in range(9999): threading.Thread(target=time.sleep, args=(99,)).start()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\ndef act(): 1 / 0",
    "def steal():\n x = []\n for _ in range(99): x = [x, x]\n return x",
    "def steal():\n x = []\n x.append(x)\n return x",
    "def steal(): return 'x' * (1 << 25)",
    "def steal():\n while True: yield 1",
    "def steal():\n x = []\n for _ in range(900): x = [x]\n return x",
)
STUBBORN = (
    "import signal\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\nwhile True: pass",
    "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "import atexit\ndef spin():\n while True: pass\natexit.register(spin)\nraise SystemExit",
    "import faulthandler, time\nfaulthandler.cancel_dump_traceback_later()\ntime.sleep(99)",
    "import sys, time\nsys.meta_path.insert(0, type('F', (), {'find_spec': lambda *_: time.sleep(99)}))\n"
    "import wave",
    "import resource\ndef act(): resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import resource\ndef act(): resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))",
    "import os\nfor n in range(64):\n try: os.close(n)\n except OSError: pass\nimport time\ntime.sleep(99)",
    "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n"
    "signal.signal(signal.SIGALRM, lambda *_: None)\nwhile True: pass",
    "import sys\nsys.addaudithook(lambda *_: 1 / 0)\ndef act(): pass",
    "import sys\nsys.modules['eval.confined.hook'].REFUSED.clear()\nimport os\ndef act(): os.fork()",
)
ATTACKS = {
    "forging": FORGING,
    "reading": READING,
    "equality": EQUALITY,
    "writing": WRITING,
    "harming": HARMING,
    "secrets": SECRETS,
    "network": NETWORK,
    "processes": PROCESSES,
    "exhausting": EXHAUSTING,
    "stubborn": STUBBORN,
}
