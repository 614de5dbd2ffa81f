# The demonstration, spelled out: four skills of the shapes world into one student, on a CPU in
# about four minutes. These are train_opd.py's own settings: this file names what one would change
# first.
model = 'data/shapes/base'
resolution = 24
teachers = [
    dict(name='base'),                      # the student keeps drawing what the base draws
    dict(name='count', lora='data/shapes/teachers/count'),
    dict(name='local_edit', lora='data/shapes/teachers/local_edit'),
    dict(name='global_edit', lora='data/shapes/teachers/global_edit')]
routes = [                                  # more for what the start cannot do, and what is hard
    dict(teacher='base', data='t2i', weight=0.5, samples=2),
    dict(teacher='count', data='count', weight=1.5, samples=8),
    dict(teacher='local_edit', data='local_edit', weight=1.0, samples=6),
    dict(teacher='global_edit', data='global_edit', weight=2.0, samples=18)]
batch_size = 34                             # the sum of the samples
routes_per_step = 'all'                     # 1: one route a step, without `samples`

init_from = 'data/shapes/teachers/local_edit'  # or 'base', or 'merge', the teachers' mean
rank = 32
steps, drop_last = 5, 1                     # not learned from: the last, at a noise of .009
method = 'danceopd'                         # or 'diffusionopd'
query = 'stratified'                        # or 'low_noise', 'mid_noise', 'high_noise', 'uniform'
max_steps = 250
lr = 8e-3
out_dir = 'out/shapes'
