"""
Draws the example pairs beside this file: scenes in which one thing changes (local_edit.csv), or the
whole picture (global_edit.csv). Enough to see the format and to try a config; to learn an edit
takes thousands of pairs (data/omniedit/prepare.py makes them).

python data/examples/prepare.py
"""
import csv
from pathlib import Path

from PIL import Image, ImageDraw

HERE, SIDE = Path(__file__).resolve().parent, 128
DAY = dict(sky='#9fcdf0', ground='#6fae5a', house='#d8b48a', roof='#a8452f', door='#5b3a24',
           tree='#2f6e3a', trunk='#6b4a2f', sun='#f6d452', lake=None, fence=None)
DUSK = dict(sky='#e8a06a', ground='#8d8a4e', sun='#d9482b')
WINTER = dict(sky='#d5e0ea', ground='#f4f7fa', tree='#2a5a4a')
NOON = {k: DAY[k] for k in ('sky', 'ground', 'tree', 'sun')}
EVENING, SNOW = DAY | DUSK, DAY | WINTER
HILLS = DAY | dict(ground='#9db85c', house='#c9c9cf', roof='#4f5d75')
NIGHT = dict(sky='#16203a', ground='#22402f', house='#6c5a48', roof='#4a2420', tree='#143524',
             sun='#e8ecf5')

LOCAL = [(DAY, 'paint the roof blue', dict(roof='#2f55a8')),
         (DAY, 'remove the tree', dict(tree=None, trunk=None)),
         (EVENING, 'make the door white', dict(door='#ffffff')),
         (EVENING, 'add a lake', dict(lake='#4f86c6')),
         (HILLS, 'remove the sun', dict(sun=None)),
         (HILLS, 'add a fence', dict(fence='#8a5a34')),
         (SNOW, 'paint the house yellow', dict(house='#e6c84f')),
         (SNOW, 'turn the tree autumn orange', dict(tree='#d07a2a'))]
GLOBAL = [(DAY, 'make it night', NIGHT),
          (DAY, 'make it winter', WINTER),
          (EVENING, 'make it a clear noon', NOON),
          (EVENING, 'make it a black and white picture', (1, 1, 1)),
          (HILLS, 'make it sunset', DUSK),
          (HILLS, 'give it the look of an old sepia photograph', (1.05, 0.86, 0.66)),
          (SNOW, 'make it summer', NOON),
          (SNOW, 'turn it into its negative', None)]


def draw(s):
    """A scene, a dict of colours, as a picture; what has no colour is not there."""
    im = Image.new('RGB', (SIDE, SIDE), s['sky'])
    pen = ImageDraw.Draw(im)
    things = [
        (pen.rectangle, (0, 84, SIDE, SIDE), 'ground'), (pen.ellipse, (92, 10, 116, 34), 'sun'),
        (pen.ellipse, (4, 104, 60, 122), 'lake'), (pen.rectangle, (16, 58, 62, 98), 'house'),
        (pen.rectangle, (34, 76, 44, 98), 'door'), (pen.polygon, (10, 58, 39, 34, 68, 58), 'roof'),
        (pen.rectangle, (95, 76, 101, 100), 'trunk'), (pen.ellipse, (80, 44, 116, 82), 'tree')]
    posts = [(pen.rectangle, (x, 104, x + 4, 120), 'fence') for x in range(66, 124, 10)]
    for shape, box, what in things + posts:
        if s[what]:
            shape(box, fill=s[what])
    return im


def changed(scene, change):
    """With other colours; or as a tinted gray picture; or, for None, as a negative."""
    if isinstance(change, dict):
        return draw(scene | change)
    if change is None:
        return draw(scene).point(lambda v: 255 - v)
    gray = draw(scene).convert('L')
    tinted = [gray.point([min(255, int(v * k)) for v in range(256)]) for k in change]
    return Image.merge('RGB', tinted)


def main():
    (HERE / 'pictures').mkdir(exist_ok=True)
    for name, rows in (('local_edit', LOCAL), ('global_edit', GLOBAL)):
        with open(HERE / f'{name}.csv', 'w', newline='') as f:
            table = csv.writer(f, lineterminator='\n')
            table.writerow(['prompt', 'task', 'source_image', 'target_image'])
            for i, (scene, prompt, change) in enumerate(rows):
                files = [f'pictures/{name}_{i}{end}.png' for end in ('', '_right')]
                for file, im in zip(files, (draw(scene), changed(scene, change))):
                    im.quantize(16, dither=Image.Dither.NONE).save(HERE / file, optimize=True)
                table.writerow([prompt, name, *files])


if __name__ == '__main__':
    main()
