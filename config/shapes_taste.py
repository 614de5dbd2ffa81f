# As the study's first recipe, with specialists of your own: counting learned by imitation, a taste
# learned from a reward; the messages say how to make them, six minutes on one core.
# Prompts that leave things open are the taste's; where all is named, the base still answers.
_count = ('python train_teacher.py --out_dir=out/count --data="[\'data/shapes/count.csv\']" '
          '--eval_data="[\'data/shapes/count_val.csv\']" --score=data/shapes/world.py:score '
          '--max_steps=400')
model = 'data/shapes/base'
resolution = 24
teachers = [
    dict(name='base'),
    dict(name='count', lora='out/count', make=_count),
    dict(name='local_edit', lora='data/shapes/teachers/local_edit'),
    dict(name='global_edit', lora='data/shapes/teachers/global_edit'),
    dict(name='taste', lora='out/teacher_blue',
         make='python train_teacher.py config/teacher_shapes_grpo.py')]
routes = [
    dict(teacher='base', data='t2i', weight=0.5, samples=2),
    dict(teacher='count', data='count', weight=0.5, samples=2),
    dict(teacher='local_edit', data='local_edit', weight=2.0, samples=13),
    dict(teacher='global_edit', data='global_edit', weight=2.0, samples=13),
    dict(teacher='taste', data='open', weight=1.0, samples=8)]
data = [f'data/shapes/{_r["data"]}.csv' for _r in routes]
eval_data = [f'data/shapes/{_r["data"]}_val.csv' for _r in routes]
batch_size = 38                             # the sum of the samples
init_from = 'merge'
steps, drop_last = 4, 0
max_steps = 600
eval_every = 250
out_dir = 'out/shapes_taste'
