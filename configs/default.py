"""Every setting of a run, once, with its unit in the name. Other configs differ from this one.

Override any of them on the command line: `--config.optimizer.learning_rate=0.01`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default settings (CIFAR-sized images, ResNet-18)."""
    config = ConfigDict()
    config.method = "jevb"  # jevb | simsiam | vi_simsiam | byol | vicreg | barlow_twins
    config.seed = 0  # parameters, order of the data, augmentation and sampling all follow from it

    # Weights to start from, optimizer and schedules anew; `train.extend` goes on instead.
    config.init = ConfigDict(
        {
            "workdir": "",  # another run of train.py, or an export; "" = weights drawn by the seed
            "step": -1,  # of that run's checkpoint; -1 = the latest
        }
    )
    config.data = ConfigDict(
        {
            "source": "arrays",  # digits | shapes | arrays | folder | tfds
            "train_paths": (),  # arrays: .npz files; folder: one directory of pictures
            "test_paths": (),
            "tfds_name": "",  # tfds: name or name:version, prepared as array_record
            "data_dir": "",  # tfds: directory that holds the prepared sets ("" = tfds' default)
            "train_split": "train",  # tfds
            "test_split": "test",  # tfds
            "image_size": 0,  # folder, shapes: pixels a side (0 = as stored; shapes: 32)
            "max_image_pixels": 89_478_485,  # folder, tfds: larger pictures are refused (Pillow's limit)
            "num_train_examples": 0,  # 0 = all; otherwise a seeded, stratified subset
            "num_test_examples": 0,
            "validation_fraction": 0.1,  # carved from train; every choice is made on it
            "split_seed": 0,  # of subsets and of the validation split
            "inlier_class": -1,  # one-class detection: train on this class alone (-1 = on all)
        }
    )
    config.input = ConfigDict(
        {
            # auto: resident on the device when the images fit under the limit, else streamed
            "placement": "auto",  # auto | resident | stream
            "resident_limit_bytes": 4_000_000_000,
            "num_workers": 0,  # stream: processes that decode (0 = threads of this one)
            "prefetch_batches": 4,  # stream
            # A run whose data are no longer those that it started on (data.json) is refused; True goes
            # on with the data as they are now: order, schedule and splits change with them.
            "accept_changed_data": False,
        }
    )
    config.augmentation = ConfigDict(
        {
            "image_size": 32,  # pixels a side of both views
            "crop_scale": (0.2, 1.0),  # share of the image's area
            "crop_ratio": (3 / 4, 4 / 3),  # width / height
            "interpolation": "bilinear",  # bilinear | bicubic, antialiased
            "flip_probability": 0.5,
            "jitter_probability": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "hue": 0.1,
            "grayscale_probability": 0.2,
            "blur_probability": (0.0, 0.0),  # of view 1, of view 2
            "blur_sigma": (0.1, 2.0),  # pixels
            "blur_kernel_size": 0,  # pixels, odd; 0 = about a tenth of the image
            "solarize_probability": (0.0, 0.0),  # of view 1, of view 2
            "solarize_threshold": 0.5,  # of [0, 1]
            "num_small_crops": 0,  # further views, sources only: they predict both full views
            "small_crop_size": 16,  # pixels a side
            "small_crop_scale": (0.05, 0.2),  # share of the image's area
            "mean": (0.4914, 0.4822, 0.4465),  # of the normalization, a channel each
            "std": (0.2470, 0.2435, 0.2616),
        }
    )
    config.model = ConfigDict(
        {
            # resnet8 | resnet18 | resnet34 | resnet50 | convnet | vit_tiny | vit_small
            "backbone": "resnet18",
            "width": 0,  # channels of the first stage (0 = the network's own)
            "stem": "cifar",  # resnet: cifar (3x3, no pool) | imagenet (7x7, pool)
            "zero_init_residual": False,  # resnet: blocks start as their shortcuts (docs/full_size.md)
            # resnet, convnet: fused (4% of a step faster) | plain (can be differentiated in forward mode)
            "batch_norm": "fused",
            "patch_size": 4,  # vit, pixels
            "projector_hidden_dims": (2048, 2048),
            "projector_normalizes_output": True,  # ends with BatchNorm
            "embedding_dim": 512,  # D
            # direction | embedding | direction_and_radius: seen by the head of jevb and vi_simsiam
            "head_input": "direction",
            "head_hidden_dim": 512,  # of the inference network or the predictor
            "initial_scale": 1.0,  # posterior standard deviation at the start
            "min_scale": 1e-3,  # its floor
            "isotropic": False,  # one posterior scale for all features of an image
            "initial_radial_scale": 0.5,
            "dtype": "float32",  # float32 | bfloat16: of the computation; parameters stay float32
        }
    )
    config.jevb = ConfigDict(
        {
            "df": 5.0,  # directional degrees of freedom; inf is the Gaussian
            "radial_df": 5.0,
            "scale_units": "sphere",  # sphere | unit
            "prior_scale": 2.0,  # the likelihood's width against the prior's noise; docs/study.md
            # chordal | stereographic (mass one; unbounded at the antipode where df < embedding_dim - 1)
            "coordinates": "chordal",
            "space": "log",  # log | linear
            "tails": "joint",  # joint | feature: one Student-t of the direction, or one a feature
            "normalized": False,  # divides the directional density by its mass on the sphere
            "num_samples": 1,
            "kl_weight": 1.0,
            "kl_warmup_epochs": 0.0,  # linear from zero
            "radial_weight": 1.0,
            "likelihood_scale": "tied",  # tied | untied (its own head) | fixed (model.initial_scale)
            "location": "sample",  # of the directional term: sample | mean
            "likelihood": "factorised",  # factorised | unfactorised (one Student-t in R^D)
        }
    )
    config.vicreg = ConfigDict(
        {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}
    )
    config.barlow_twins = ConfigDict({"redundancy_weight": 0.0051, "loss_weight": 1.0})
    config.optimizer = ConfigDict(
        {
            "name": "sgd",  # sgd | lars | larc (lars that only lowers the rate) | adamw
            "learning_rate": 0.06,  # peak, as it is: not scaled with the batch
            "momentum": 0.9,  # all but adamw
            "weight_decay": 5e-4,  # not on biases, BatchNorm and scalars
            "trust_coefficient": 1e-3,  # lars, larc
            "bias_rate_factor": 1.0,  # of biases, BatchNorm and scalars, times the learning rate
            "constant_head_rate": False,  # the head keeps the peak rate (SimSiam)
            "warmup_epochs": 10.0,  # linear from zero
            "final_learning_rate": 0.0,  # of the cosine
            "max_gradient_norm": 0.0,  # 0 = no clipping
        }
    )
    config.train = ConfigDict(
        {
            "batch_size": 512,  # images a step, global
            "num_epochs": 200,
            # Allows a run in its directory to be made longer, by a larger num_epochs. From where it
            # stands on, learning rate and target decay are those of a run of the new length at that
            # step: after the end of the shorter run the rate jumps up (docs/faq.md).
            "extend": False,
            "num_micro_batches": 1,  # gradient accumulation; BatchNorm sees micro-batches
            "bn_group_size": 0,  # examples that BatchNorm takes together; 0 = the global batch
            "ema_decay": 0.0,  # of the parameters; 0 = off. Evaluation uses the average
            "target_decay": 0.0,  # of a target network, rising to 1; 0 = none (BYOL: 0.99)
            "shard_optimizer_state": False,  # each device keeps its part of it only (ZeRO-1)
            "steps_per_dispatch": 0,  # steps in one compiled call (0 = 1 on the CPU, else 10)
            "log_every_steps": 10,
            "health_every_steps": 200,  # effective rank, on images of the validation split
            "health_pairs": False,  # jevb: residuals and gradients of pairs of views as well
            "health_num_images": 2048,  # at most; the rank needs more than embedding_dim
            # k-NN on the validation split, every so many epochs and at the end (0 = off): a forward pass
            # of the training and validation images each time.
            "knn_every_epochs": 0,
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every_steps": 1000,
            "keep_latest": 2,  # at least 2, so that a damaged one has a predecessor
            # Best by k-NN on validation with the first of evaluation.knn_k, at every save when above 0.
            "keep_best": 0,
        }
    )
    config.evaluation = ConfigDict(
        {
            "batch_size": 512,
            "split": "test",  # what is reported: test | validation (to choose settings)
            "knn_k": (20, 200),
            "knn_temperature": 0.1,
            "knn_uniform_k": (10,),  # with votes that count alike; () = none
            "l2_grid": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # chosen on validation
            "labels_per_class": 10,  # of the few-label probe; 0 = off
            "few_label_seeds": 5,  # subsets averaged over
            "compare_untrained": True,  # the same numbers for the encoder before training
        }
    )
    # Out-of-distribution detection and the use of uncertainty; `evaluate.py --ood=FILE` replaces it.
    config.ood = ConfigDict(
        {
            "name": "corruptions",  # of the protocol
            "outside": (),  # sets: one `outside_set()` each
            "choice": (),  # sets of which validation images choose one score; never reported
            "corruptions": (),  # of the evaluated images, see corruptions.py; () = none
            "severities": (1, 2, 3, 4, 5),
            "num_corrupted_images": 2000,  # the first so many
            "default_score": "",  # the row without a choice ("" = the method's own: methods.METHODS)
            "num_views": 4,  # of jevb's terms: the image itself and augmented ones
            "num_samples": 8,  # of each view's posterior
            "max_fit_images": 10_000,  # of the training split, for the feature scores; 0 = all
            "knn_k": (50,),
            "ssd_clusters": (1, 10),
            "mixture_df": 5.0,  # tails of the kernels of jevb/mixture; inf is the Gaussian
            "residual_share": 0.5,  # of the features: dimension of the principal subspace
            "num_bootstrap": 100,  # resamples of an interval
            "human_counts_path": "",  # .npz with `cifar10h_counts`, votes by test image and class
        }
    )
    return config
