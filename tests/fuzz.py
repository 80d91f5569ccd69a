"""Every reader of files, given damaged and hostile ones: it refuses them with the errors that it
promises, or reads what is in them.

    python tests/fuzz.py --reader all --mutants 100000 --seed 0 [--record]
    python tests/fuzz.py --reader npz --seed 0 --only 4711

A mutant is decided by reader, seed and number. It escapes where the reader raises something else,
names no file, dies, hangs, takes more than a second or a gibibyte above what the file is worth, or
reads content that is not the original's under the original's digest. Exit status 1: one escaped."""
import argparse
import copy
import faulthandler
import gzip
import hashlib
import io
import json
import mmap
import os
import pickle
import pickletools
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from weat_nb import (checkpoints, dynamics, fetch, grid, own_data, pretrained, readers,
                     record_tables, runs, sweep_table)
from weat_nb.data import ImageData
from weat_nb.kept_batches import KeptBatches, batch_of
from weat_nb.models import create_model
from weat_nb.outcomes import read_outcomes
from weat_nb.tensors import CheckpointError, load_tensors, save_tensors, tensors_sha256

FIGURES = Path(__file__).with_name('fuzz.json')
GIB = 1 << 30


# Mutations

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 4096, 65535, 65536, 10**6, 2**31 - 1, 2**31,
           2**32 - 1, 10**12, 2**63 - 1, 2**64 - 1)
VALUES = (None, True, False, 0, -1, 1, 2, .5, -0., 1e308, float('nan'), float('inf'), 10**6, 10**12,
          2**63, 10**30, '', 'x', 'resnet8', '../x', '\ud800', '\0', 'é', [], {}, [[]], [1, 2],
          {'x': 1}, '0'*64, 'float16', '8/255')


def span(rng, data, most=64):
    "A piece of the data"
    a = rng.randrange(len(data) + 1)
    return a, min(len(data), a + rng.randint(1, most))


def scatter(rng, data, others=()):
    "One change that knows nothing of the format"
    data = bytearray(data)
    a, b = span(rng, data)
    kind = rng.randrange(12)
    if kind == 0 and data:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1: del data[a:]
    elif kind == 2: del data[a:b]
    elif kind == 3: data[a:a] = data[a:b]*rng.choice((1, 1, 2, 100))
    elif kind == 4: data[a:a] = rng.randbytes(rng.randint(1, 32))
    elif kind == 5:
        data += rng.choice((bytes(rng.randint(1, 4096)), rng.randbytes(64), bytes(data)))
    elif kind == 6:
        c, d = span(rng, data)
        data[a:b], data[c:d] = data[c:d], data[a:b]
    elif kind == 7: # an integer of any width and order
        width, number = rng.choice((1, 2, 4, 8)), rng.choice(NUMBERS)
        data[a:a + width] = (number % (1 << 8*width)).to_bytes(width, rng.choice(('little', 'big')))
    elif kind == 8: # a number in letters
        digits = [i for i in range(len(data)) if 48 <= data[i] < 58]
        if digits:
            i = rng.choice(digits)
            data[i:i + rng.randint(1, 3)] = str(rng.choice((*NUMBERS, -1, '1e999'))).encode()
    elif kind == 9 and others: # the beginning of one, the end of another
        other = rng.choice(others)
        c, _ = span(rng, other)
        data[a:] = other[c:]
    elif kind == 10 and b > a: data[a:b] = bytes([rng.choice((0, 255, 32, 10, data[a]))])*(b - a)
    elif kind == 11:
        mark = rng.choice((b'[', b'{', b'(', b'"', b',', b'\n', b'\t'))
        data[a:a] = mark*rng.choice((1, 1, 3000))
    return bytes(data)


def scattered(rng, data, others=()):
    for _ in range(rng.choice((1, 1, 1, 2, 4, 9))): data = scatter(rng, data, others)
    return data


def other_json(rng, tree):
    "The tree with one place changed"
    places = []
    def walk(node):
        if isinstance(node, dict): keys = list(node)
        elif isinstance(node, list): keys = range(len(node))
        else: return
        for key in keys:
            places.append((node, key))
            walk(node[key])
    tree = copy.deepcopy(tree)
    walk(tree)
    if not places or rng.random() < .03: return copy.deepcopy(rng.choice(VALUES))
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0: del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(('x', '', 'config', 'é'))] = node.pop(key)
    elif kind == 2: node[key] = [copy.deepcopy(node[key])]
    elif kind == 3: node[key] = copy.deepcopy(rng.choice(places)[0])
    elif kind == 4 and isinstance(node[key], (int, float)):
        node[key] = rng.choice((-1, 10))*node[key] + rng.choice((0, 1))
    else: node[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def as_json(rng, data):
    "JSON that is JSON, with another content; a key that comes twice, and depth"
    text = json.dumps(other_json(rng, json.loads(data)))
    kind = rng.randrange(12)
    if kind == 0 and '{"' in text: text = text.replace('{"', '{"epoch": 1, "x": 1, "x": 2, "', 1)
    if kind == 1: text = '['*100_000 + text
    if kind == 2: text = text.replace(': ', ': ' + '{"x":'*rng.choice((1, 2000)), 1)
    if kind == 3: text = text.replace('1', '1'*5000, 1)
    return text.encode(errors='surrogatepass')


def each_line(rng, data):
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = as_json(rng, lines[i]) + b'\n'
    return b''.join(lines)


def ops(data):
    "The pieces of a pickle, an instruction each"
    starts = [at for _, _, at in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]


BOMBS = (
    b'(', b'0', b'2', b'1', b')', b']', b'}', b'e', b's', b'u', b't', b'R', b'b', b'\x81', b'N',
    b'.', b'K\xff', b'M\xff\xff', b'J\xff\xff\xff\x7f', b'J\xff\xff\xff\xff', b'a', b'\x85',
    b'\x86',
    b'r\xff\xff\xff\x07', b'j\xff\xff\xff\x07', b'q\x00', b'h\x00', b'Q', b'P0\n',
    b'Vx\n',
    b'\x8a\x08' + b'\xff'*8, b'\x96' + struct.pack('<Q', 1 << 34),
    b'\x8e' + struct.pack('<Q', 1 << 34), b'cos\nsystem\n', b'\x82\x01',
    b'B' + struct.pack('<I', 1 << 31), b'X' + struct.pack('<I', 1 << 31), b'G' + b'\xff'*8)


def as_pickle(rng, data):
    "Other instructions; what follows the first pickle of a file stays"
    try: parts = ops(data)
    except Exception: return scattered(rng, data) # not a pickle any more
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, kind = rng.randrange(len(parts)), rng.randrange(6)
        if kind == 0: del parts[i]
        elif kind == 1: parts.insert(i, parts[rng.randrange(len(parts))])
        elif kind == 2: parts[i], parts[-1 - i] = parts[-1 - i], parts[i]
        elif kind == 3: parts.insert(i, rng.choice(BOMBS)*rng.choice((1, 1, 1, 1, 50)))
        elif kind == 4: parts[i] = scatter(rng, parts[i])
        else: parts[i] = rng.choice(BOMBS)
        if not parts: break
    return b''.join(parts)


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def zipped(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, 'w', compression) as archive:
        warnings.simplefilter('ignore') # a name that is there twice
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compression)
    return buffer.getvalue()


def as_npy(rng, data):
    "Another header, of the right length"
    try:
        end = 10 + struct.unpack_from('<H', data, 8)[0]
        header, rest = data[10:end], data[end:]
    except struct.error: return scattered(rng, data)
    kind = rng.randrange(5)
    if kind == 0: header = scattered(rng, header)
    elif kind == 1:
        shape = tuple(rng.choice((*NUMBERS, -1, 0, 1, 4, 8)) for _ in range(rng.randrange(6)))
        header = str(dict(descr=rng.choice(('|u1', '<i8', '<f4', '|O', '<U9', '|V0')),
                          fortran_order=rng.random() < .3, shape=shape)).encode()
    elif kind == 2: header = header.replace(b'(', b'('*rng.choice((1, 90, 5000)), 1)
    elif kind == 3: header = header.replace(b"'|u1'", rng.choice((
        b"'|b1'", b"'|i1'", b"'<u2'", b"[('a', '|u1')]", b"'M8'", b"'|S1'", b"('u1', (2, 3))")))
    else: rest = scattered(rng, rest)
    return data[:8] + struct.pack('<H', min(len(header), 65535)) + header + rest


def in_zip(inner):
    "Another member, its checksum right; compressed, doubled, renamed"
    def mutate(rng, data):
        files = list(members(data).items())
        i = rng.randrange(len(files))
        name, content = files[i]
        kind = rng.randrange(8)
        if kind < 5: content = inner(rng, content)
        elif kind == 5: name = rng.choice(('x', '../x', '/x', name.upper(), files[-1][0], ''))
        elif kind == 6: files.insert(i, files[rng.randrange(len(files))])
        else: content += bytes(rng.choice((1, 1000, 10**6)))
        files[i] = name, content
        return zipped(files, rng.choice((
            zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA)))
    return mutate


def zip_fields(rng, data):
    "Another number in one of the archive's own records: sizes, methods, flags, offsets"
    data = bytearray(data)
    marks = [i for mark in (b'PK\1\2', b'PK\3\4', b'PK\5\6') for i in range(len(data) - 30)
             if data[i:i + 4] == mark]
    if not marks: return bytes(data)
    at, width = rng.choice(marks) + rng.randrange(4, 46), rng.choice((1, 2, 4))
    data[at:at + width] = (rng.choice(NUMBERS) % (1 << 8*width)).to_bytes(width, 'little')
    return bytes(data)


def in_gzip(inner):
    def mutate(rng, data):
        content = inner(rng, gzip.decompress(data))
        if rng.random() < .02: content += bytes(10**6)
        return gzip.compress(content, 1, mtime=0)
    return mutate


def as_safetensors(rng, data):
    "Another header, of the right length"
    n = int.from_bytes(data[:8], 'little')
    header, rest = data[8:8 + n], data[8 + n:]
    header = rng.choice((as_json, scattered))(rng, header)
    if rng.random() < .3: rest = scattered(rng, rest)
    return len(header).to_bytes(8, 'little') + header + rest


def signed_anew(rng, data):
    "Other tensors or metadata, under a checksum that is right"
    n = int.from_bytes(data[:8], 'little')
    note = json.loads(json.loads(data[8:8 + n])['__metadata__']['weat_nb'])
    tensors, metadata = safetensors.torch.load(data), note['metadata']
    if rng.random() < .7: metadata = other_json(rng, metadata)
    else:
        name = rng.choice(sorted(tensors))
        t = tensors.pop(name)
        kind = rng.randrange(5)
        if kind == 1: tensors[name + 'x'] = t
        elif kind == 2: tensors[name] = t.reshape(-1)[:rng.randrange(9)].clone()
        elif kind == 3: tensors[name] = t.double() if t.is_floating_point() else t.float()
        elif kind == 4: tensors[name] = t.unsqueeze(0).clone()
    metadata = json.loads(json.dumps(metadata))
    note = dict(sha256=tensors_sha256(tensors, metadata), metadata=metadata)
    return safetensors.torch.save(tensors, {'weat_nb': json.dumps(note)})


def as_png(rng, data):
    "Other chunks, their checksums right"
    chunks, at = [], 8
    while at + 8 <= len(data):
        n = int.from_bytes(data[at:at + 4], 'big')
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + n]))
        at += 12 + n
    if not chunks: return scattered(rng, data)
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    which = rng.randrange(5)
    if which == 0: chunks.insert(i, chunks[rng.randrange(len(chunks))])
    elif which == 1:
        kinds = b'iCCP', b'zTXt', b'tRNS', b'PLTE', b'fcTL', b'eXIf'
        chunks[i] = rng.choice(kinds), content
    elif which == 2 and kind == b'IHDR':
        sizes = 0, 1, 8, 16, 4096, 10**5, 2**31 - 1
        size = struct.pack('>II', *(rng.choice(sizes) for _ in range(2)))
        depth, colour = rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6))
        chunks[i] = kind, size + bytes([depth, colour, 0, 0, rng.randrange(2)])
    elif which == 3: del chunks[i]
    else: chunks[i] = kind, scattered(rng, content)
    return data[:8] + b''.join(
        struct.pack('>I', len(c)) + k + c + struct.pack('>I', zlib.crc32(k + c)) for k, c in chunks)


def as_tar(rng, data):
    "Other headers, their checksums right"
    data = bytearray(data)
    at = rng.randrange(max(1, len(data)//512))*512
    a, b = rng.choice((
        (0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500)))
    if rng.random() < .7:
        data[at + a:at + b] = scattered(rng, bytes(data[at + a:at + b]))[:b - a].ljust(b - a, b'\0')
        header = bytearray(data[at:at + 512])
        header[148:156] = b' '*8
        data[at + 148:at + 156] = b'%06o\0 ' % sum(header)
        return bytes(data)
    return scattered(rng, bytes(data))


# Readers

@dataclass(frozen=True)
class Reader:
    "A way into the package"
    good:Callable # what there is beside the file is made in a folder; contents of good files
    read:Callable # the content of the file at a path
    promises:tuple[type[Exception], ...] # what it may raise
    file:str = 'file' # its name
    mutations:tuple[Callable, ...] = () # that know the format; half of all mutants
    sealed:bool = False # has it a checksum, so that no other content may be read?
    shown:Callable|None = None # of the path and the content: a digest that the package shows
    mutants:int = 100_000 # how many by default


READERS = {}
def reader(name, *args, **options): READERS[name] = Reader(*args, **options)

WHAT = dict( # for the page
    tensors='tensors with a checksum', checkpoint='a network, signed anew',
    snapshots='snapshots, signed anew', pth='weights of others: zip of torch.save',
    pth_legacy='weights of others: bare pickle', safetensors='weights of others: safetensors',
    note='description of a published network', npz='images: one .npz',
    own_npz='images: .npz of training and test',
    folder='images: PNG, JPEG, BMP, GIF, TIFF, WebP, PPM', jpegs='JPEGs of Tiny-ImageNet',
    idx='arrays of Fashion-MNIST', gz='the same, packed', unpickle='batches of CIFAR',
    tar='the archive of CIFAR', tiny='labels of Tiny-ImageNet', lines='metrics.jsonl',
    run='config.json of a run', records='records of evaluations', outcomes='outcomes of images',
    batch='kept batches, signed anew', executed='an executed notebook',
    scores='what a sweep reads of a run', grid='a grid of runs, YAML')


def rng_of(*what): return random.Random('/'.join(map(str, what)))


def some_tensors():
    g = torch.Generator().manual_seed(0)
    return {'conv.weight': torch.randn(3, 2, generator=g),
            'conv.bias': torch.randn(3, generator=g).half(),
            'bn.num_batches_tracked': torch.tensor(7), 'mask': torch.tensor([True, False])}


def written(write, folder, name='good'):
    "What a function writes to a path"
    path = folder/name
    write(path)
    return path.read_bytes()


# Of this project: tensors with a checksum

def good_tensors(folder):
    metadata = dict(epoch=1, of='é')
    return [written(lambda p: save_tensors(p, some_tensors(), metadata), folder)]

reader('tensors', good_tensors, load_tensors, (CheckpointError,), 'file.safetensors',
       (as_safetensors,), sealed=True)


def good_checkpoint(folder):
    model = create_model('resnet8', 10, 1, 28, seed=0)
    metadata = dict(epoch=3, config=dict(objective='sat'))
    return [written(lambda p: checkpoints.save_checkpoint(
        p, model, metadata=metadata, dtype=torch.float16), folder)]

def checkpoint_content(path):
    model, metadata = checkpoints.load_checkpoint(path)
    return model.state_dict(), model.config, metadata

reader('checkpoint', good_checkpoint, checkpoint_content, (CheckpointError,), 'file.safetensors',
       (signed_anew, as_safetensors))


def good_snapshots(folder):
    values = {f'{k}_{s}': torch.linspace(-1, 1, 4)
              for k in ('energy', 'joint') for s in ('nat', 'adv')}
    save = lambda epoch: lambda p: save_tensors(p, values, dict(epoch=epoch))
    (folder/'snapshots').mkdir()
    written(save(1), folder/'snapshots', 'epoch_0001.safetensors')
    return [written(save(2), folder)]

reader('snapshots', good_snapshots, lambda p: dynamics.read_snapshots(p.parent.parent),
       (ValueError,), 'snapshots/epoch_0002.safetensors', (signed_anew, as_safetensors))


# Of others: state dicts

def good_state_dicts(**options):
    def good(folder):
        for content in ({'state_dict': some_tensors(), 'epoch': 3}, some_tensors()):
            yield written(lambda p: torch.save(content, p, **options), folder)
    return lambda folder: list(good(folder))

reader('pth', good_state_dicts(), pretrained.read_state_dict, (CheckpointError,), 'file.pth',
       (in_zip(as_pickle), in_zip(scattered), zip_fields), mutants=10_000)
reader('pth_legacy', good_state_dicts(_use_new_zipfile_serialization=False),
       pretrained.read_state_dict, (CheckpointError,), 'file.pth', (as_pickle,), mutants=10_000)
reader('safetensors', lambda folder: [safetensors.torch.save(some_tensors())],
       pretrained.read_state_dict, (CheckpointError,), 'file.safetensors', (as_safetensors,))


def good_note(folder):
    weights = good_checkpoint(folder)[0]
    (folder/'mine.safetensors').write_bytes(weights)
    what = dict(name='mine', sha256=hashlib.sha256(weights).hexdigest(), model=dict(arch='resnet8'),
                epoch=3, config=dict(objective='sat'), version='0.1.0')
    return [json.dumps(what, indent=1).encode()]

def note_content(path):
    model = pretrained.load_pretrained('mine', root=path.parent)
    return model.state_dict(), model.config

reader('note', good_note, note_content, (ValueError,), 'mine.json', (as_json,), sealed=True)


# Images of one's own

def some_images(n=6, h=8, w=8, c=3):
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(n, h, w, c), dtype=np.uint8), np.arange(n) % 3

def good_npz(folder):
    x, y = some_images()
    for names in own_data.NPZ_NAMES:
        arrays = {n: x if 'label' not in n and not n.startswith('y_') else y for n in names if n}
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, **arrays)
            yield buffer.getvalue()

def shown_of_images(path, content):
    names = tuple(map(str, range(65_536)))
    return [ImageData(torch.from_numpy(x), torch.from_numpy(y), names, 'x').sha256()
            for x, y in content]

reader('npz', lambda folder: list(good_npz(folder))[:2], lambda p: [own_data.read_npz(p)],
       (ValueError,), 'file.npz', (in_zip(as_npy), zip_fields), shown=shown_of_images)
reader('own_npz', lambda folder: list(good_npz(folder)), lambda p: own_data.read_own(p)[0],
       (ValueError,), 'file.npz', (in_zip(as_npy), zip_fields), shown=shown_of_images)


FORMATS = dict(png={}, jpeg=dict(quality=95), bmp={}, gif={}, tiff=dict(compression='tiff_lzw'),
               webp={}, ppm={})

def good_pictures(folder):
    x, _ = some_images(1, 16, 16)
    for name in 'a', 'b':
        (folder/name).mkdir()
        Image.fromarray(x[0]).save(folder/name/'z.png')
    for kind, options in FORMATS.items():
        for mode in ('RGB', 'L'):
            buffer = io.BytesIO()
            Image.fromarray(x[0]).convert(mode).save(buffer, kind, **options)
            yield buffer.getvalue()

def as_picture(rng, data):
    return (as_png if data[:4] == b'\x89PNG' else scattered)(rng, data)

def folder_content(path): return own_data.read_own(path.parent.parent)[0]

reader('folder', lambda folder: list(good_pictures(folder)), folder_content, (ValueError,),
       'a/x.png', (as_picture,), shown=shown_of_images)
reader('jpegs', lambda folder: list(good_pictures(folder))[2:4],
       lambda p: readers.decode_jpegs(lambda name: p.read_bytes(), [p.name], 16), (ValueError,),
       'x.jpg')


# Data sets

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()

def as_idx(rng, data):
    dimensions = rng.choice((0, 1, 3, 3, 4, 33, 255))
    shape = [rng.choice((*NUMBERS, 6, 8)) % 2**32 for _ in range(dimensions)]
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, '>u4').tobytes() + data[16:]

reader('idx', lambda folder: [idx(some_images()[0]), idx(np.arange(5, dtype=np.uint8))],
       lambda p: readers.read_idx(p.read_bytes(), p), (ValueError,), mutations=(as_idx,))


def good_gz(folder): return [gzip.compress(idx(some_images()[0]), mtime=0)]

def gz_content(path):
    md5 = fetch.md5sum(idx(some_images()[0]))
    return fetch.read_checked(path, md5, gunzip=True)

reader('gz', good_gz, gz_content, (ValueError,), 'x.gz', (in_gzip(scattered),), sealed=True)


def good_batches(folder):
    old = ( # as Python 2 wrote them
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87"
        b"Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x18"
        + bytes(range(100, 124)) +
        b"tbU\x06labelsq\x08]q\t(K\x06K\x03eU\x0bbatch_labelq\nU\x04testq\x0bu.")
    return [old, pickle.dumps({'label_names': ['a', 'b'], 'num_vis': 3072}, protocol=0)]

reader('unpickle', good_batches, lambda p: readers.unpickle(p.read_bytes(), p),
       (pickle.UnpicklingError,), mutations=(as_pickle,), mutants=10_000)


def good_tar(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name in ('data/x', 'data/é', 'data/y'):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(range(200))*3))
    return [gzip.compress(buffer.getvalue(), mtime=0)]

def tar_content(path):
    folder = path.parent/'data'
    shutil.rmtree(folder, ignore_errors=True)
    fetch.unpack(path.read_bytes(), folder, ['x', 'y'])
    return {p.name: p.read_bytes() for p in folder.iterdir()}

reader('tar', good_tar, tar_content, (ValueError,), 'x.tar.gz', (in_gzip(as_tar),))


def good_tiny(folder):
    at = folder/'tiny-imagenet-200'
    (at/'val/images').mkdir(parents=True)
    x, _ = some_images(2, 64, 64)
    for i in range(2): Image.fromarray(x[i]).save(at/f'val/images/val_{i}.JPEG')
    (at/'wnids.txt').write_text('n02\nn01\n')
    (at/'words.txt').write_text('n01\tgoldfish, Carassius\nn02\tsalamander\n')
    return [b'val_0.JPEG\tn01\t0\t0\t62\t62\nval_1.JPEG\tn02\t1\t2\t62\t62\n']

reader('tiny', good_tiny, lambda p: readers.read_tiny_imagenet(False, p.parents[2]), (ValueError,),
       'tiny-imagenet-200/val/val_annotations.txt')


# What runs leave behind

def good_lines(folder):
    rows = [dict(epoch=i, loss=1/3, clean=50.5, pgd=30., selectable=True) for i in range(3)]
    return [written(lambda p: runs.write_lines(p, rows), folder)]

reader('lines', good_lines, runs.read_lines, (ValueError,), 'metrics.jsonl', (each_line,))

CONFIG = dict(dataset='cifar10', beta=6., seed=0, epochs=100, arch='resnet18', schedule=[1, 2])

def run_content(path):
    before = path.read_bytes()
    runs.open_run(path.parent, CONFIG, defaults=dict(seed=0))
    assert path.read_bytes() == before, 'it was written to'
    return None

reader('run', lambda folder: [json.dumps(CONFIG).encode()], run_content, (ValueError,),
       'config.json', (as_json,), sealed=True)


def good_records(folder):
    found = sorted((Path(__file__).parent.parent/'nbs/results/records').glob('*.json'),
                   key=lambda p: p.stat().st_size)
    return [p.read_bytes() for p in found[:4]]

reader('records', good_records, lambda p: record_tables.read_records(p.parent), (ValueError,),
       'records/x.json', (as_json,))


def good_grids(folder):
    cells = [dict(cell_type='code', metadata=dict(tags=['parameters']), source=[
        'objective: str = "sat" # x\n', 'beta: float = None # x\n', 'lr: float = .1 # x\n',
        'run_dir: str = None # x'])]
    notebook = json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    for name in ('train', 'evaluate'): (folder/f'{name}.ipynb').write_text(notebook)
    return [b'notebook: train.ipynb\nparameters: {lr: 0.01}\ngrid:\n  objective: [sat, trades]\n'
            b'then:\n  notebook: evaluate.ipynb\n  parameters: {objective: "{run_dir}"}\n',
            b'notebook: train.ipynb\ngrid:\n- objective: [sat]\n  beta: [1, 2.5]\n- lr: [8/255]\n'
            b'pages: [evaluate.ipynb]\n']

def as_yaml(rng, data):
    import yaml
    text = yaml.safe_dump(other_json(rng, yaml.safe_load(data)), allow_unicode=True)
    kind = rng.randrange(8)
    if kind == 0: text = text.replace(': ', ': &a ', 1).replace('[', '[*a, ')
    if kind == 1: text = text.replace(': ', rng.choice((
        ': !!python/name:os.system ', ': !!int ', ': 2024-13-45 ', ': !!timestamp ', ': !!binary ',
        ': ? ', ': 0x', ': 1:99 ')), 1)
    if kind == 2: text += 'x: ' + '['*3000
    return text.encode(errors='surrogatepass')

def grid_content(path):
    found = grid.read_grid(path, path.parent/'out')
    return [([(s.notebook.name, s.given, s.identity) for s in r.tasks], r.folder.name)
            for r in found.runs]

reader('grid', good_grids, grid_content, (ValueError, FileNotFoundError), 'grid.yaml', (as_yaml,))


RECORD = 'fashion_mini-sat-resnet8-seed0'

def good_outcomes(folder):
    found = Path(__file__).parent.parent/'nbs/results/records'
    shutil.copy(found/f'{RECORD}.json', folder)
    return [(found/f'{RECORD}.outcomes.safetensors').read_bytes()]

reader('outcomes', good_outcomes, lambda p: read_outcomes(p.with_name(f'{RECORD}.json')),
       (ValueError,), f'{RECORD}.outcomes.safetensors', (signed_anew, as_safetensors), sealed=True)


def nobody(*args, **images): raise ValueError('it would be measured again')

def batch_content(path, measure=nobody):
    "What is read of a kept batch of three images, and the generator's next number"
    x, y = (torch.from_numpy(a) for a in some_images())
    data = ImageData(x.permute(0, 3, 1, 2).contiguous()[:3], y[:3], ('a', 'b', 'c'), 'x')
    g = torch.Generator().manual_seed(0)
    kept = KeptBatches(path.parent, dict(eps=.1, steps=[1, 2]), generator=g)
    return kept.run(lambda: kept.joined(torch.arange(3), batch_of(data, 'cpu'), measure),
                    usual=3, most=3, device='cpu'), torch.rand(1, generator=g)

def good_batch(folder):
    g = torch.Generator().manual_seed(1)
    file = folder/'of'/'00000-003.safetensors'
    batch_content(file, lambda indices, x, y: dict(drawn=torch.rand(3, 2, generator=g)))
    tensors, note = load_tensors(file)
    note['batch']['seconds'] = .25 # the same mutants each time
    return [written(lambda p: save_tensors(p, tensors, note), folder)]

reader('batch', good_batch, batch_content, (ValueError,), '00000-003.safetensors',
       (signed_anew, as_safetensors))


def good_executed(folder):
    report, output = dict(tags=['report']), dict(
        output_type='execute_result', data={'text/plain': ['1']}, metadata={}, execution_count=2)
    cells = [dict(cell_type='markdown', id='a', metadata=report, source=['[x](y.ipynb)\n', 'é']),
             dict(cell_type='code', id='b', metadata=dict(tags=['injected-parameters']),
                  execution_count=1, source=['# Parameters\n', 'seed = 1'], outputs=[]),
             dict(cell_type='code', id='c', metadata=report, execution_count=2, source='seed',
                  outputs=[output])]
    nb = dict(cells=cells, metadata=dict(kernelspec=dict(name='python3')), nbformat=4,
              nbformat_minor=5)
    return [json.dumps(nb, indent=1).encode()]

def executed_content(path):
    return runs.publish_run(path, path.parent/'page', 'A run', 'of a test').read_bytes()

reader('executed', good_executed, executed_content, (ValueError,), 'out.ipynb', (as_json,))


def good_scores(folder):
    (folder/'run').mkdir()
    model = create_model('resnet8', 10, 1, 28, seed=0)
    checkpoints.save_checkpoint(folder/'run/best.safetensors', model, metadata=dict(epoch=1),
                                dtype=torch.float16)
    (folder/'run/record.json').write_bytes(good_records(folder)[0])
    return good_lines(folder)

reader('scores', good_scores, lambda p: sweep_table.scores(p.parent.parent), (ValueError,),
       'run/metrics.jsonl', (each_line,))


# One mutant

def feed(sha, x):
    "Type and content of nested values into a hash"
    if isinstance(x, torch.Tensor):
        if x.numel()*x.element_size() > GIB: raise MemoryError(f'a tensor {tuple(x.shape)}')
        sha.update(f'{x.dtype}{tuple(x.shape)}{x.layout}'.encode())
        sha.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                   if x.layout == torch.strided and x.device.type == 'cpu' else b'')
    elif isinstance(x, np.ndarray):
        sha.update(f'{x.dtype}{x.shape}'.encode())
        sha.update(x.tobytes() if x.dtype != object else repr(x.tolist()).encode())
    elif isinstance(x, dict):
        sha.update(b'{%d' % len(x))
        for k, v in sorted(x.items(), key=lambda item: repr(item[0])): feed(sha, k), feed(sha, v)
    elif isinstance(x, (list, tuple)):
        sha.update(b'[%d' % len(x))
        for v in x: feed(sha, v)
    else: sha.update((type(x).__name__ + repr(x)).encode(errors='surrogatepass'))


def digest(x):
    sha = hashlib.sha256()
    try: feed(sha, x)
    except RecursionError: pass # nested more deeply than this function follows
    return sha.hexdigest()


class Escape(Exception): "What must not happen"


NO_MEMORY = ("can't allocate memory", 'not enough memory', 'bad_alloc', 'Unable to allocate')

def check_refusal(e, reader, path):
    "Is the error a promised one, readable, and no sign of memory that ran out?"
    seen = e
    while seen is not None:
        if isinstance(seen, MemoryError) or any(s in str(seen) for s in NO_MEMORY):
            raise Escape(f'memory: {type(seen).__name__}: {seen}')
        seen = seen.__cause__ or seen.__context__
    if not isinstance(e, reader.promises): raise Escape(f'{type(e).__name__}: {e}')
    text = str(e)
    if path.name not in text and str(path.parent) not in text:
        raise Escape(f'names no file: {type(e).__name__}: {e}')
    if len(text) > 2000: raise Escape(f'a message of {len(text)} characters: {text[:200]}')
    try: text.encode()
    except UnicodeEncodeError: raise Escape(f'a message that cannot be printed: {text!r}') from None


def mutant(name, good, seed, n):
    "The nth mutant"
    rng, reader = rng_of(name, seed, n), READERS[name]
    data = rng.choice(good)
    if reader.mutations and rng.random() < .5: return rng.choice(reader.mutations)(rng, data)
    return scattered(rng, data, good)


def judge(name, path, data, digests):
    "refused, equal or new; else an Escape"
    reader = READERS[name]
    path.write_bytes(data)
    begun = time.process_time()
    try:
        try: content = reader.read(path)
        finally: took = time.process_time() - begun
        found = digest(content)
        if found in digests: return 'equal'
        if reader.sealed: raise Escape('other content under a checksum')
        if reader.shown and tuple(reader.shown(path, content)) in digests.values():
            raise Escape('other content under the same digest')
        return 'new'
    except Escape: raise
    except Exception as e:
        check_refusal(e, reader, path)
        return 'refused'
    finally:
        if took > 1 + len(data)/1e7: raise Escape(f'it takes {took:.1f} s')


def prepare(name, folder):
    "Path of the file, good files, and their digests"
    reader = READERS[name]
    good = list(reader.good(folder))
    path = folder/reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = {}
    for data in good:
        path.write_bytes(data)
        content = reader.read(path)
        digests[digest(content)] = tuple(reader.shown(path, content)) if reader.shown else None
    return path, good, digests


# Many mutants, in a process of their own

OUTCOMES = ('refused', 'equal', 'new', 'escaped')

def limit_memory(most=GIB):
    "A gibibyte above what is there"
    import resource
    now = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
    resource.setrlimit(resource.RLIMIT_AS, (now + most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def work(name, folder, seed, numbers, board, found):
    path, good, digests = prepare(name, folder)
    for n in numbers:
        board[0] = n
        data = seed[n] if isinstance(seed, list) else mutant(name, good, seed, n)
        try: outcome = judge(name, path, data, digests)
        except Escape as e:
            outcome = 'escaped'
            last = e.__context__ and traceback.extract_tb(e.__context__.__traceback__)[-1]
            where = f' ({Path(last.filename).name}:{last.lineno})' if last else ''
            line = ' '.join(f'{name} {n}: {e}'[:300].split()) + where
            found.write(line.encode(errors='backslashreplace') + b'\n')
        board[1 + OUTCOMES.index(outcome)] += 1


def watched(run, number, patience):
    "The exit status of a function in a process of its own, killed where a number stays the same"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            warnings.simplefilter('ignore')
            faulthandler.disable() # pytest's own: a crash is reported by its status
            silent = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2): os.dup2(silent, stream)
            if sys.platform == 'linux': limit_memory()
            run()
            code = 0
        finally: os._exit(code)
    at, since, pause = None, time.monotonic(), .002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        if number() != at: at, since = number(), time.monotonic()
        elif time.monotonic() - since > patience: os.kill(pid, signal.SIGKILL)
        time.sleep(pause := min(.1, 1.2*pause))


def fuzz(name, seed, mutants, patience=30., first=0):
    "Counts of outcomes, and a line for each escape"
    folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
    board = memoryview(mmap.mmap(-1, 48)).cast('q')
    try:
        with open(folder/'escapes', 'ab+', buffering=0) as found:
            while first < mutants:
                inside = Path(tempfile.mkdtemp(dir=folder))
                board[0] = -1
                status = watched(
                    lambda: work(name, inside, seed, range(first, mutants), board, found),
                    lambda: board[0], patience)
                if not status: break
                if status > 0:
                    raise RuntimeError(f'{name}, mutant {board[0]}: the fuzzer failed; see --only')
                why = ('it hangs' if -status == signal.SIGKILL
                       else f'it ends by {signal.Signals(-status).name}')
                found.write(f'{name} {board[0]}: {why}\n'.encode())
                board[4] += 1
                first = board[0] + 1
            found.seek(0)
            lines = found.read().decode().splitlines()
        return dict(zip(OUTCOMES, board[1:5])), lines
    finally: shutil.rmtree(folder, ignore_errors=True)


def versions():
    from importlib.metadata import version
    return {p: version(p) for p in ('numpy', 'pillow', 'safetensors', 'torch')}


def record(name, row):
    rows = json.loads(FIGURES.read_text(encoding='utf-8')) if FIGURES.exists() else {}
    rows[name] = row
    order = [n for n in READERS if n in rows]
    FIGURES.write_text(json.dumps({n: rows[n] for n in order}, indent=1) + '\n', encoding='utf-8')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--reader', default='all', help=f'all, or some of {", ".join(READERS)}')
    parser.add_argument('--mutants', type=int, help='default: 100000, of pickles 10000')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, help='this mutant alone, here, with its traceback')
    parser.add_argument('--record', action='store_true', help=f'write the counts to {FIGURES.name}')
    args = parser.parse_args(argv)
    names = list(READERS) if args.reader == 'all' else args.reader.split(',')
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            path, good, digests = prepare(names[0], Path(folder))
            data = mutant(names[0], good, args.seed, args.only)
            print(f'{len(data)} bytes: {data[:300]!r}')
            print(judge(names[0], path, data, digests))
        return 0
    escaped = 0
    for name in names:
        begun, mutants = time.monotonic(), args.mutants or READERS[name].mutants
        counts, lines = fuzz(name, args.seed, mutants)
        escaped += counts['escaped']
        print(f'{name}: {counts}, {mutants/(time.monotonic() - begun):.0f} a second', flush=True)
        kinds = Counter(line.split(': ', 1)[1][:70] for line in lines)
        for kind, times in kinds.most_common(20):
            print(f'   {times} × {next(line for line in lines if kind in line)}')
        if args.record: record(name, dict(
            what=WHAT[name], mutants=mutants, seed=args.seed, **counts, versions=versions()))
    return int(escaped > 0)


if __name__ == '__main__': sys.exit(main())
