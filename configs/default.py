"""The default of every setting of a run. Names contain the unit; other configs change some values.

To override a setting, use the command line: `--config.optimizer.learning_rate=0.01`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default settings (CIFAR-sized images, ResNet-18)."""
    config = ConfigDict()
    # jevb | simsiam | vi_simsiam | byol | vicreg | barlow_twins | fastsiam | emp_ssl
    config.method = "jevb"
    config.seed = 0  # determines parameters, order of the data, augmentation and sampling

    # Weights to start from. Optimizer and schedules start anew; `train.extend` continues them.
    config.init = ConfigDict(
        {
            # another run of train.py, an export, or a backbone.safetensors with torchvision's or timm's
            # names (docs/use.md)
            "workdir": "",  # "" = random weights
            "step": -1,  # step of that run's checkpoint; -1 = the latest
            # The stem and so many first stages (resnet, convnet) or blocks (vit) keep their weights,
            # and their BatchNorm uses and keeps its running statistics; 0 = all learn, the stem too.
            "frozen_stages": 0,
        }
    )
    config.data = ConfigDict(
        {
            # digits | shapes | arrays | features | folder | paths | tfds | webdataset | hf
            # (docs/data.md)
            "source": "arrays",
            # arrays, features: .npz or .npy files; folder: one directory of pictures; paths: one text
            # or CSV file with paths of pictures; webdataset: tar files or patterns of them;
            # hf: one directory of save_to_disk, or parquet or Arrow files
            "train_paths": (),
            "test_paths": (),
            "tfds_name": "",  # tfds: name or name:version, prepared as array_record
            "data_dir": "",  # tfds: directory of the prepared data sets ("" = tfds' default)
            "train_split": "train",  # tfds
            "test_split": "test",  # tfds
            "image_column": "image",  # hf
            "label_column": "label",  # hf; "" = no labels
            "image_size": 0,  # pictures, shapes: height = width in pixels (0 = as stored; shapes: 32)
            # The next three are for encoded pictures: folder, paths, tfds, webdataset, hf.
            "max_image_pixels": 89_478_485,  # Pillow's limit; a larger picture is an error
            "exif": "apply",  # orientation of a photograph: apply | ignore (as torchvision does)
            # A picture that cannot be read: refuse, or skip, which decodes all at the start of a run.
            "skip_broken": "refuse",  # refuse | skip
            "labels": "given",  # given | none (ignored; the folders of a folder are no classes)
            # 0 = as stored; pictures: color. 1 | 3 | 4 (with transparency) for pictures.
            "num_channels": 0,
            "dtype": "uint8",  # of arrays and pictures: uint8 | uint16 | float32 (docs/data.md)
            "value_range": (),  # (black, white) of uint16, float32; () = (0, 65535), (0.0, 1.0)
            "num_train_examples": 0,  # 0 = all; otherwise a seeded, stratified subset
            "num_test_examples": 0,
            "validation_fraction": 0.1,  # share of the training images; used for every choice
            "split_seed": 0,  # seed of the subsets and of the validation split
            "inlier_class": -1,  # one-class detection: train only on this class (-1 = on all)
            "inlier_classes": (),  # train only on these classes; the others are outside (() = all)
        }
    )
    config.input = ConfigDict(
        {
            # auto: keep all images on the device if they are below the limit, else stream them
            "placement": "auto",  # auto | resident | stream
            "resident_limit_bytes": 4_000_000_000,
            "num_workers": 0,  # stream: processes that decode (0 = threads of this process)
            "prefetch_batches": 4,  # stream
            # A run stops with an error if its data have changed since its start (data.json). True
            # continues with the new data; order, schedule and splits then change.
            "accept_changed_data": False,
        }
    )
    config.augmentation = ConfigDict(
        {
            "image_size": 32,  # height = width of the full views, in pixels
            # What training crops: square, the square of data.image_size pixels that the device holds,
            # or image, the whole picture in its file, on the host (docs/settings.md).
            "crop_from": "square",  # square | image (encoded pictures, streamed)
            # Only for image. simd is faster, needs the extra `photos`, and differs by at most 2 levels;
            # it is bilinear, for color and gray with 8 bits.
            "crop_resizer": "pillow",  # pillow | simd
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
            "blur_probability": (0.0, 0.0),  # for views 1, 3, ... and for views 2, 4, ...
            "blur_sigma": (0.1, 2.0),  # pixels
            "blur_kernel_size": 0,  # pixels, odd; 0 = about a tenth of the image
            "solarize_probability": (0.0, 0.0),  # for views 1, 3, ... and for views 2, 4, ...
            "solarize_threshold": 0.5,  # in [0, 1]
            "num_views": 2,  # full views of an image; each predicts every other one
            "num_small_crops": 0,  # further views that predict the full views and are no targets
            "small_crop_size": 16,  # height = width in pixels
            "small_crop_scale": (0.05, 0.2),  # share of the image's area
            "mean": (0.4914, 0.4822, 0.4465),  # for the normalization, one per channel
            "std": (0.2470, 0.2435, 0.2616),
        }
    )
    # Only for data.source = "features". Number of views: augmentation.num_views.
    config.feature_views = ConfigDict(
        {
            "num_features": 0,  # F; 0 = as in the data (the run saves the number)
            "num_stored_views": 0,  # V of [N, V, F], 1 for [N, F]; 0 = as in the data
            "standardize": True,  # each column, by its mean and deviation in the training split
            # Also for stored views; set both to 0 to train on stored views as they are.
            "noise_scale": 0.5,  # standard deviation of the noise / that of the column
            "mask_probability": 0.2,  # of each column, to be replaced by its mean
        }
    )
    config.model = ConfigDict(
        {
            # resnet8 | resnet18 | resnet34 | resnet50 | convnet | vit_tiny | vit_small; for published
            # weights timm_vit_tiny | timm_vit_small | dinov2_small | dinov2_small_registers
            # (docs/use.md); identity for features, which are then the representation
            "backbone": "resnet18",
            "width": 0,  # channels of the first stage (0 = the network's own)
            "stem": "cifar",  # resnet: cifar (3x3, no pool) | imagenet (7x7, pool)
            # resnet: True starts each residual block as its shortcut alone (docs/full_size.md)
            "zero_init_residual": False,
            # resnet, convnet: fused (a step is 4% faster) | plain (supports forward mode)
            "batch_norm": "fused",
            "patch_size": 4,  # vit, pixels; published weights: timm_vit 16, dinov2 14
            # timm_vit, dinov2: class (the class token) | mean (of the patches)
            "pool": "class",
            "projector_hidden_dims": (2048, 2048),
            "projector_normalizes_output": True,  # the projector ends with BatchNorm
            "embedding_dim": 512,  # D
            # Input of the head of jevb and vi_simsiam: direction | embedding | direction_and_radius
            "head_input": "direction",
            "head_hidden_dim": 512,  # hidden layer of the inference network or the predictor
            "initial_scale": 1.0,  # posterior standard deviation at the start
            "min_scale": 1e-3,  # smallest posterior standard deviation
            "isotropic": False,  # one posterior scale for all features of an image
            "initial_radial_scale": 0.5,
            "dtype": "float32",  # computation in float32 | bfloat16; parameters stay float32
        }
    )
    config.jevb = ConfigDict(
        {
            "df": 5.0,  # directional degrees of freedom; inf is the Gaussian
            "radial_df": 5.0,
            "scale_units": "sphere",  # sphere | unit
            "prior_scale": 2.0,  # standard deviation of the prior (docs/study.md)
            # chordal | stereographic (mass one; unbounded at the antipode if df < embedding_dim - 1)
            "coordinates": "chordal",
            "space": "log",  # log | linear: the radial Student-t is in log(radius) or in the radius
            "tails": "joint",  # joint | feature: one Student-t for all features, or one for each
            "normalized": False,  # True divides the directional density by its mass on the sphere
            "num_samples": 1,
            "kl_weight": 1.0,
            "kl_warmup_epochs": 0.0,  # the KL weight rises linearly from zero
            "radial_weight": 1.0,
            "likelihood_scale": "tied",  # tied | untied (its own head) | fixed (model.initial_scale)
            "location": "sample",  # location of the directional term: sample | mean
            "likelihood": "factorised",  # factorised | unfactorised (one Student-t in R^D)
        }
    )
    config.vicreg = ConfigDict(
        {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}
    )
    config.barlow_twins = ConfigDict({"redundancy_weight": 0.0051, "loss_weight": 1.0})
    config.emp_ssl = ConfigDict({"invariance_weight": 200.0, "squared_epsilon": 0.2})
    config.optimizer = ConfigDict(
        {
            # sgd | lars | larc (lars that only lowers the learning rate) | adamw | muon
            "name": "sgd",
            "learning_rate": 0.06,  # peak value; not scaled with the batch size
            "momentum": 0.9,  # sgd, lars, larc
            # not applied to biases, BatchNorm, scalars, and learned positions and tokens
            "weight_decay": 5e-4,
            "trust_coefficient": 1e-3,  # lars, larc
            "bias_rate_factor": 1.0,  # multiplies the rate of all that has no weight decay
            "constant_head_rate": False,  # True: the head keeps the peak learning rate (SimSiam)
            "warmup_epochs": 10.0,  # the learning rate rises linearly from zero
            "final_learning_rate": 0.0,  # at the end of the cosine schedule
            "max_gradient_norm": 0.0,  # 0 = no clipping
            # Multiplies the rate of stage or block i of L by layer_decay^(L - i), that of the stem by
            # layer_decay^L; 1 = off.
            "layer_decay": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "batch_size": 512,  # images per step, over all devices
            "num_epochs": 200,
            # True allows a larger num_epochs for the existing run in this directory. From then on,
            # learning rate and target decay are those of a run of the new length at that step. If
            # the shorter run had ended, the learning rate therefore jumps up (docs/faq.md).
            "extend": False,
            "num_micro_batches": 1,  # gradient accumulation; BatchNorm sees one micro-batch
            # BatchNorm's statistics: False = of each view by itself; True = of all views of one size
            # together. In both cases more than two views of one size are one batch of the network.
            "bn_over_views": False,
            "bn_group_size": 0,  # examples in a BatchNorm group; 0 = all examples of a micro-batch
            "ema_decay": 0.0,  # moving average of the parameters, used in evaluation; 0 = off
            # Moving average of a target network, rises to 1; 0 = no target network (BYOL: 0.99).
            "target_decay": 0.0,
            "shard_optimizer_state": False,  # each device keeps only its part of the state (ZeRO-1)
            "steps_per_dispatch": 0,  # steps in one compiled call (0 = 1 on the CPU, else 10)
            "log_every_steps": 10,
            "health_every_steps": 200,  # health checks such as effective rank, on validation images
            # jevb: also check gradients of pairs of views and, of a factorised likelihood with chordal
            # coordinates and joint tails, residuals.
            "health_pairs": False,
            "health_num_images": 2048,  # at most; the rank needs more images than embedding_dim
            # k-NN accuracy on the validation split, every so many epochs and at the end (0 = off).
            # Each time costs a forward pass of the training and validation images.
            "knn_every_epochs": 0,
            # Who gets a copy of metrics.jsonl: auto (TensorBoard if it is installed) | tensorboard |
            # wandb | mlflow | trackio; () = nobody
            "writers": ("auto",),
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every_steps": 1000,
            "keep_latest": 2,  # at least 2, so that a damaged checkpoint has a predecessor
            # Number of best checkpoints to keep. Above 0, every save computes the k-NN accuracy on
            # validation images with the first of evaluation.knn_k.
            "keep_best": 0,
            # At most so much of the fitted scores is saved after the evaluation (the default score
            # first, then the smallest), so that `load` needs no training images. 0 = none.
            "fitted_megabytes": 100,
        }
    )
    config.evaluation = ConfigDict(
        {
            "batch_size": 512,
            "split": "test",  # the reported split: test | validation (to choose settings)
            "knn_k": (20, 200),
            "knn_temperature": 0.1,
            "knn_uniform_k": (10,),  # numbers of neighbors with equal votes; () = none
            "l2_grid": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # one is chosen on validation
            "labels_per_class": 10,  # for the few-label probe; 0 = off
            "few_label_seeds": 5,  # number of label subsets in the mean
            "compare_untrained": True,  # also report the encoder before training
        }
    )
    # Out-of-distribution detection and checks of uncertainty. `evaluate.py --ood=FILE` replaces it.
    config.ood = ConfigDict(
        {
            "name": "corruptions",  # name of the protocol
            "outside": (),  # outside sets, each made by `outside_set()`
            "choice": (),  # outside sets on which one score is chosen; these are never reported
            "corruptions": (),  # corruptions of the evaluated images, see corruptions.py; () = none
            "severities": (1, 2, 3, 4, 5),
            "num_corrupted_images": 2000,  # only the first images are corrupted
            "default_score": "",  # "" = the default score of the method: methods.METHODS
            "num_views": 4,  # for jevb's terms: the image itself and augmented ones
            "num_samples": 8,  # posterior samples of each view
            "max_fit_images": 10_000,  # training images to which scores are fitted; 0 = all
            "knn_k": (50,),
            "ssd_clusters": (1, 10),
            "norm_exponents": (),  # beta of representation/mahalanobis_beta_*, each in [0, 4]
            # representation/mahalanobis_beta_by_dimension chooses among these; () = no such score.
            "norm_exponent_choices": (),
            "mixture_df": 5.0,  # df of the kernels of jevb/mixture; inf is the Gaussian
            "residual_share": 0.5,  # dimension of the principal subspace / number of features
            # Crops of each of four rotations of an image for embedding/csi (10 as published); 0 = off.
            "csi_crops": 0,
            # probe/loss_prediction, which needs labels, and jevb/loss_prediction (num_views above 1).
            "loss_prediction": False,
            "num_bootstrap": 100,  # resamples for an interval
            "human_counts_path": "",  # .npz with `cifar10h_counts`: votes by test image and class
        }
    )
    return config
