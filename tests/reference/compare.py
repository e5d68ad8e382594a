"""Checking an implementation against a fixture (numpy + torch + filler.py only).

    fx = load('fixtures/unet_sd_v1_small.json')
    m = MyUNet(**fx['params']); check_keys(m, fx); filler.fill(m, fx['seed'], fx.get('fill_rules', ())); m.eval()
    x = inputs(fx); out = m(x['x'], x['timesteps'], context=x['context'])
    print(check(fx, {'out': out}))            # [] when equal within atol + rtol * |expected|
"""
import json
import torch
from tests.reference import filler


def load(path): return json.load(open(path))


def inputs(fx, seed=None):
    o = {}
    for s in fx['inputs']:
        if 'value' in s: o[s['name']] = torch.tensor(s['value'], dtype=getattr(torch, s['dtype'])); continue
        o[s['name']] = filler.draw(fx['seed'] if seed is None else seed, s['name'], s['shape'], s['kind'], s.get('low', 0), s.get('high', 1)) * s.get('scale', 1)
    return o


def check_keys(module, fx):
    have = {k: list(v.shape) for k, v in module.state_dict().items()}; want = fx['keys']
    bad = {'missing': sorted(set(want) - set(have)), 'extra': sorted(set(have) - set(want)), 'shape': [k for k in want if k in have and want[k] != have[k]]}
    assert not any(bad.values()), bad


def check(fx, outs, factor=1.0):
    """list of (name, what, got, expected, allowed); names absent from outs are skipped"""
    bad = []
    for name, o in outs.items():
        e = fx['outputs'][name]; t = torch.as_tensor(o).detach()
        if list(t.shape) != e['shape']: bad.append((name, 'shape', list(t.shape), e['shape'], None)); continue
        f = t.double().reshape(-1); a = fx['atol'][name] * factor; r = fx['rtol'] * factor
        for what, got, want in (('first', f[:32], e['first']), ('strided', f[::e['stride']][:32], e['strided'])):
            want = torch.tensor([float(v) for v in want], dtype=torch.float64)
            if not torch.allclose(got, want, rtol=r, atol=a, equal_nan=True): i = int((got - want).abs().argmax()); bad.append((name, f'{what}[{i}]', float(got[i]), float(want[i]), a))
        for what, got in (('mean', f.mean()), ('std', f.std(correction=0))):
            if f.numel() and abs(float(got) - float(e[what])) > a + r * abs(float(e[what])): bad.append((name, what, float(got), e[what], a))
    return bad


import contextlib


@contextlib.contextmanager
def fixed_noise(seed):
    """torch.randn and torch.randn_like give filler.Noise(seed) draws in call order, as in every fixture that says Noise(seed)"""
    n = filler.Noise(seed); r, l = torch.randn, torch.randn_like
    torch.randn = lambda *s, **k: n(s[0] if len(s) == 1 and not isinstance(s[0], int) else s)
    torch.randn_like = lambda x, **k: n(x.shape)
    try: yield n
    finally: torch.randn, torch.randn_like = r, l
