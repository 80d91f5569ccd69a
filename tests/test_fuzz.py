"""Damaged and hostile files: some mutants of every reader (tests/fuzz.py makes more), every escape
that was ever found, and files that promise more than a machine has"""
import gzip
import io
import json
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz import READERS, Reader

from weat_nb import readers, runs
from weat_nb.data import load_images

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='mutants are tried in a fork')
FEW = 25 # mutants


@pytest.fixture(scope='module', autouse=True)
def imported(tmp_path_factory):
    "What reading a batch imports, once for all forks"
    READERS['batch'].good(tmp_path_factory.mktemp('batch'))


@pytest.mark.parametrize('name', READERS)
def test_some_mutants(name):
    counts, lines = fuzz.fuzz(name, 1, FEW)
    assert not lines and sum(counts.values()) == FEW and counts['refused'] > 0


def test_no_more_is_read_than_there_is():
    "All pixels are there, in a piece that says it has 4 GB"
    data = png(16, 16)[:33] + b'\xff\xff\xff\xf0IDAT' + zlib.compress(bytes(784))
    counts, lines = fuzz.fuzz('folder', [data], 1)
    assert not lines and counts['new'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', READERS)
def test_more_mutants(name):
    counts, lines = fuzz.fuzz(name, 2, 10*FEW)
    assert not lines and counts['equal'] + counts['new'] > 0 # not all is refused


# Escapes that were found, and bombs: each is refused with a promised error

def good(name, tmp_path, i=0):
    (tmp_path/name).mkdir()
    return list(READERS[name].good(tmp_path/name))[i]


def npy(shape, dtype='|u1', content=b''):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + content


def npz(image=None, label=None, **options):
    files = {'image.npy': npy((2, 8, 8, 3), content=bytes(384)) if image is None else image,
             'label.npy': npy((2,), '<i8', bytes(16)) if label is None else label}
    return fuzz.zipped(files.items(), **options)


def png(width, height):
    header = struct.pack('>II', width, height) + bytes([8, 2, 0, 0, 0])
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(bytes(1000))), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(c)) + k + c + struct.pack('>I', zlib.crc32(k + c)) for k, c in chunks)


def sparse_tar(size):
    "A file of zeros, said to be that long"
    info = tarfile.TarInfo('data/x')
    info.pax_headers = {'GNU.sparse.map': f'0,0,{size},0', 'GNU.sparse.size': str(size)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz', format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    return buffer.getvalue()


def boast(data):
    "A zip whose last member is said to have 4 GB"
    at = data.rindex(b'PK\1\2') + 24
    return data[:at] + b'\xfe\xff\xff\xff' + data[at + 4:]


def laughs(n): # lists of ten of the one before
    return 'notebook: train.ipynb\nx0: &x0 [1]\n' + ''.join(
        f'x{i + 1}: &x{i + 1} [{", ".join([f"*x{i}"]*10)}]\n' for i in range(n))


DEEP, EIGHT = b'['*200_000, b'\xff'*8
BAD = { # reader -> what it is: content
    'pth': {
        'nothing at all': b'', 'a letter': b'x', 'a zip of nothing': b'PK\5\6' + bytes(18),
        'an offset before the file': b'PK\3\4' + bytes(200) + b'PK\5\6' + b'\xff'*18,
        '4 GB in a hundred bytes': boast(fuzz.zipped([('a/data.pkl', b'\x80\2}.')]))},
    'pth_legacy': {
        'a magic number alone': b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.',
        'a text of 2 GiB': b'\x80\x02X\xff\xff\xff\x7fx.', 'a stack that is empty': b'\x80\x020.',
        'a list of lists': b'\x80\x02' + b'('*100_000 + b'l.'},
    'safetensors': {
        'nothing at all': b'', 'a header of 2⁶⁴ bytes': EIGHT + b'{}',
        'a header of 100 MB': struct.pack('<Q', 10**8) + b'{' + b' '*1000,
        'depth': struct.pack('<Q', len(DEEP)) + DEEP},
    'tensors': {'depth': struct.pack('<Q', len(DEEP) + 1) + b'{' + DEEP},
    'snapshots': {'nothing at all': b''},
    'note': {
        'depth': DEEP, 'no digest': b'{}', 'a list': b'[]', 'bytes': b'\xff',
        'a number as digest': b'{"sha256": 1}'},
    'npz': {
        'nothing at all': b'', '10¹² images': npz(npy((10**12, 8, 8, 3))),
        '10¹² labels, of no bytes': npz(label=npy((10**12,), '|V0')),
        'a header of brackets': npz(npy('('*5000)),
        'more dimensions than NumPy has': npz(npy((1,)*99)),
        'labels beyond any number of classes': npz(label=npy((2,), '<i8', EIGHT[:7] + bytes(9))),
        'labels that NumPy makes negative': npz(label=npy((2,), '<u8', EIGHT*2)),
        'an array that is there twice': fuzz.zipped([('image.npy', npy((1,)))]*2),
        'a header that NumPy reads twice': npz(image=b'\x93NUMPY\1\0' + struct.pack('<H', 9000)
                                               + b"{'descr': (" + b'"a '*2996 + b'  '),
        'compressed by bzip2': npz(compression=zipfile.ZIP_BZIP2),
        'compressed by an unknown method': npz().replace(b'PK\1\2\x14\3\x14\0\0\0\0\0',
                                                         b'PK\1\2\x14\3\x14\0\0\0\x63\0')},
    'folder': {
        'nothing at all': b'', '2⁶² pixels': png(2**31 - 1, 2**31 - 1),
        '10⁸ pixels': png(10_000, 10_000),
        'a program for Ghostscript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n'},
    'jpegs': {'10⁸ pixels': png(10_000, 10_000)},
    'idx': {
        'nothing at all': b'', 'three bytes': b'\0\0\x08', 'no dimension': b'\0\0\x08\0x',
        '255 dimensions': b'\0\0\x08\xff' + b'\xff'*1020,
        '2⁶⁴ images of no pixels': b'\0\0\x08\3' + EIGHT + bytes(4)},
    'gz': {'nothing at all': b''},
    'unpickle': {
        'nothing at all': b'', 'a table of 2³¹ entries': b'\x80\x02}r\xff\xff\xff\x7f.',
        'a bytearray of 16 GiB': b'\x80\x05\x96' + struct.pack('<Q', 1 << 34) + b'x.',
        'an array of 10¹² numbers': b'cnumpy\nndarray\n(I1000000000000\ntR.',
        'a list': b'].', 'a program': b'cos\nsystem\n(S"true"\ntR.'},
    'tar': {
        'nothing at all': b'', 'a text': gzip.compress(b'x'*2000),
        '1 TB of zeros': sparse_tar(10**12)},
    'tiny': {
        'bytes': b'\xff', 'a line without tabs': b'val_0.JPEG\n',
        'an unknown class': b'val_0.JPEG\tn03\n', 'a way out': b'../../x.JPEG\tn01\n'},
    'lines': {
        'depth': b'{"a": ' + DEEP, 'a number of 5000 digits': b'{"a": ' + b'1'*5000 + b'}',
        'a key that is there twice': b'{"epoch": 1, "epoch": 2}', 'a list': b'[1]',
        'half of a character': rb'{"a": "\ud800"}'},
    'run': {'depth': DEEP, 'bytes': b'\xff'},
    'records': {'depth': DEEP, 'bytes': b'\xff'},
    'batch': {'nothing at all': b'', 'a header of 2⁶⁴ bytes': EIGHT + b'{}'},
    'executed': {'depth': DEEP, 'bytes': b'\xff', 'nothing': b'{}', 'no cells': b'{"cells": 1}'},
    'scores': {'no epoch': b'{"pgd": 1, "clean": 1}', 'a list': b'{"pgd": 1, "epoch": []}'},
    'grid': {
        'bytes': b'\xff', 'depth': b'grid: ' + b'['*2000, 'aliases': laughs(20).encode(),
        'an alias of itself': b'grid: &a [*a]',
        'a program': b'grid: !!python/object/apply:os.system [true]',
        'a name of 5000 letters': b'notebook: ' + b'x'*5000 + b'\ngrid: {beta: [1]}',
        '10⁶ runs': b'notebook: train.ipynb\ngrid: {beta: [%s], lr: [%s]}' % (
            (b', '.join(b'%d' % i for i in range(1000)),)*2)},
}


@pytest.mark.parametrize('name', BAD)
def test_what_escaped_once_and_bombs(name):
    counts, lines = fuzz.fuzz(name, [*BAD[name].values()], len(BAD[name]))
    assert not lines and counts['refused'] == len(BAD[name]), [*BAD[name]]


@pytest.mark.slow
def test_zip_and_gzip_bombs():
    "128 MiB of zeros in one: refused before they are unpacked, or not unpacked to their end"
    image = npy((1 << 17, 32, 32, 1), content=bytes(1 << 27))
    packed = npz(image, compression=zipfile.ZIP_DEFLATED)
    for name, data in (('gz', gzip.compress(image, 1)), ('npz', packed)):
        counts, lines = fuzz.fuzz(name, [data], 1)
        assert len(data) < 1 << 21 and counts['refused'] == 1, lines


def test_signed_anew(tmp_path):
    "Checksums that are right, of content that is not"
    import safetensors.torch

    from weat_nb.tensors import tensors_sha256
    tensors = fuzz.some_tensors()
    def signed(metadata):
        note = dict(sha256=tensors_sha256(tensors, metadata), metadata=metadata)
        return safetensors.torch.save(tensors, {'weat_nb': json.dumps(note)})
    resnet = dict(arch='resnet8', num_classes=10, in_channels=1, image_size=28)
    bad = [signed(m) for m in (
        None, 1, [], 'x', {}, dict(config=1), dict(config=[]), dict(config={}),
        dict(config=dict(arch=1)), dict(config=resnet),
        dict(config={**resnet, 'num_classes': 10**12}, metadata={}),
        dict(config={**resnet, 'num_classes': 10**8}, metadata={}),
        dict(config={**resnet, 'mean': 'x'}, metadata={}))]
    counts, lines = fuzz.fuzz('checkpoint', bad, len(bad))
    assert not lines and counts['refused'] == len(bad)
    bad = [signed(dict(epoch=e)) for e in ('x', None, -1, [1])] + [signed({})]
    counts, lines = fuzz.fuzz('snapshots', bad, len(bad))
    assert not lines and counts['refused'] == len(bad)


def test_labels_are_no_memory_bomb(tmp_path):
    "A name for each class up to the largest label would be as many strings"
    (tmp_path/'x.npz').write_bytes(npz(label=npy((2,), '<i8', struct.pack('<qq', 0, 10**12))))
    with pytest.raises(ValueError, match=r'x\.npz: labels go from 0 to 1000000000000: classes are '
                                         'numbered from 0, up to 65535'):
        load_images(tmp_path/'x.npz')


def test_a_batch_changes_nothing_of_numpy():
    "What a pickle can name is a stand-in: neither the array nor its type is NumPy's own"
    change = (b'cnumpy\ndtype\n(S"u1"\nI00\nI00\ntR(I3\nS">"\nNNNI9\nI-1\nI0\ntb0'
              b'(dS"x"\ncnumpy\nndarray\n(I1\ntRs.') # a dict with an array of one number
    with pytest.raises(pickle.UnpicklingError, match="has no attribute 'array'"):
        readers.unpickle(change)
    assert str(np.dtype('u1')) == 'uint8' and np.dtype('u1').alignment == 1


# The fuzzer finds what it looks for

def broken(kind):
    def read(path):
        if path.read_bytes() == b'good': return b'good'
        if kind == 'IndexError': raise IndexError
        if kind == 'names no file': raise ValueError('it is damaged')
        if kind == 'memory': return bytearray(2 << 30)
        if kind == 'memory, handled':
            try: bytearray(2 << 30)
            except MemoryError as e: raise ValueError(f'{path} is damaged') from e
        if kind == 'it ends by SIGSEGV': os.kill(os.getpid(), signal.SIGSEGV)
        if kind == 'it hangs': time.sleep(60)
        if kind == 'takes':
            begun = time.process_time()
            while time.process_time() < begun + 1.2: pass
        if kind == 'a message of': raise ValueError(f'{path} is damaged' + 'x'*5000)
        if kind == 'cannot be printed': raise ValueError(f'{path} is damaged: \ud800')
        return path.read_bytes()
    return Reader(lambda folder: [b'good'], read, (ValueError,), sealed=kind == 'under a checksum',
                  shown=(lambda path, content: ['same']) if kind == 'the same digest' else None)


@pytest.mark.parametrize('kind', [
    'IndexError', 'names no file', 'memory', 'memory, handled', 'it ends by SIGSEGV', 'it hangs',
    pytest.param('takes', marks=pytest.mark.slow), 'a message of', 'cannot be printed',
    'under a checksum', 'the same digest', 'nothing'])
def test_the_fuzzer(kind, monkeypatch):
    if kind.startswith('memory') and sys.platform != 'linux':
        pytest.skip('memory is limited on Linux')
    monkeypatch.setitem(READERS, 'broken', broken(kind))
    patience, escaped = .5 if kind == 'it hangs' else 30, int(kind != 'nothing')
    counts, lines = fuzz.fuzz('broken', [b'bad', b'good'], 2, patience)
    assert counts == dict(refused=0, equal=1, new=1 - escaped, escaped=escaped)
    assert len(lines) == escaped and all(kind.partition(',')[0] in line for line in lines)


def test_mutants_are_numbered(tmp_path, capsys):
    "The same number is the same mutant, and the command says which"
    for name in ('tensors', 'pth', 'npz', 'folder', 'tar', 'lines', 'grid'):
        files = list(READERS[name].good(tmp_path))
        first, again = ([fuzz.mutant(name, files, 3, n) for n in range(20)] for _ in range(2))
        assert first == again and len({*first}) > 10
    assert fuzz.main(['--reader', 'idx', '--seed', '3', '--only', '7']) == 0
    assert 'refused' in capsys.readouterr().out


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fuzz, 'FIGURES', tmp_path/'fuzz.json')
    assert fuzz.main(['--reader', 'idx,lines', '--mutants', '20', '--record']) == 0
    rows = json.loads((tmp_path/'fuzz.json').read_text())
    assert [*rows] == ['idx', 'lines'] and rows['idx']['mutants'] == 20
    monkeypatch.setitem(READERS, 'broken', broken('IndexError'))
    assert fuzz.main(['--reader', 'broken', '--mutants', '5']) == 1
    assert 'broken 0: IndexError' in capsys.readouterr().out


def test_figures_of_the_page():
    "Every reader was tried often enough, and nothing escaped"
    rows = json.loads(fuzz.FIGURES.read_text(encoding='utf-8'))
    assert [*rows] == [*READERS]
    for name, row in rows.items():
        assert row['escaped'] == 0 and row['mutants'] >= READERS[name].mutants, name
        assert sum(row[o] for o in fuzz.OUTCOMES) == row['mutants']


# One error for many

def test_reading_makes_one_line_of_any_error():
    for text in ('a\nb', '', 'x'*10**6, '\ud800\0'):
        with pytest.raises(ValueError) as e, runs.reading(
                'file.npz', 'is damaged', 'restore it', KeyError): raise KeyError(text)
        said = str(e.value)
        assert re.fullmatch(r'file\.npz is damaged \([^\n]+\): restore it', said)
        assert len(said) < 300
        said.encode()
    with pytest.raises(AssertionError), runs.reading(
            'file.npz', 'is damaged', 'restore it', KeyError): raise AssertionError('our own')


def test_no_reader_catches_everything():
    "A handler of Exception around a reader would hide this package's own faults"
    root = Path(fuzz.__file__).parent.parent/'weat_nb'
    catch = {p.stem for p in root.glob('*.py')
             if 'except Exception' in p.read_text(encoding='utf-8')}
    # around models, modules and notebooks of others, which raise anything; and around the checks
    # of a machine, each of which fails by itself
    assert catch <= {'attacked_model', 'attacks', 'bench', 'guards', 'models', 'own', 'probe',
                     'schema', 'sweep'}
