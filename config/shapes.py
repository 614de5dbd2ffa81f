# The demonstration, spelled out: four skills of the shapes world into one student, on a CPU in
# about eight minutes. These are train_opd.py's own settings: this file names what one would change
# first.
model = 'data/shapes/base'
resolution = 24
teachers = [
    dict(name='base'),                      # the student keeps drawing what the base draws
    dict(name='count', lora='data/shapes/teachers/count'),
    dict(name='local_edit', lora='data/shapes/teachers/local_edit'),
    dict(name='global_edit', lora='data/shapes/teachers/global_edit')]
routes = [                                  # more for what is harder to learn: edits
    dict(teacher='base', data='t2i', weight=0.5, samples=2),
    dict(teacher='count', data='count', weight=0.5, samples=2),
    dict(teacher='local_edit', data='local_edit', weight=2.0, samples=15),
    dict(teacher='global_edit', data='global_edit', weight=2.0, samples=15)]
batch_size = 34                             # the sum of the samples
routes_per_step = 'all'                     # 1: one route a step, without `samples`

init_from = 'merge'                         # or 'base', or one teacher's folder
rank = 32
steps = 4
method = 'danceopd'                         # or 'diffusionopd'
query = 'stratified'                        # or 'low_noise', 'mid_noise', 'high_noise', 'uniform'
max_steps = 500
lr = 8e-3
out_dir = 'out/shapes'
