"""What report.html says of a run of scaleprotoseg.py: its numbers, columns, figures and next commands."""
import html

from common.files import some_of
from common.report import Page

PRINTED = {                                                            # data set: its name, mIoU of the paper
    "cityscapes": ("Cityscapes val, ResNet-101", dict(scaleprotoseg=68.97, protoseg=67.54, deeplab=71.40)),
    "voc": ("Pascal VOC val, ResNet-101", dict(scaleprotoseg=71.80, protoseg=71.98)),
    "ade20k": ("ADE20K val, ResNet-101", dict(scaleprotoseg=34.18, protoseg=29.67, deeplab=34.00)),
    "cocostuff164k": ("COCO-Stuff, ResNet-101", dict(scaleprotoseg=34.50, protoseg=32.97)),
    "em": ("EM, first of two splits, U-Net", dict(scaleprotoseg=77.97, protoseg=77.63)),
}
NAMES = {"scaleprotoseg": "ScaleProtoSeg", "protoseg": "ProtoSeg", "deeplab": "DeepLabv2 by its own recipe"}
GONE = {"duplicates": "duplicates", "pruned": "pruned", "of_absent_classes": "of classes without a training "
                                                                             "pixel"}


def headline(metrics):
    """{what it is: percent}, ours first, then the stages before, then the paper's."""
    method, split = metrics.get("method", "scaleprotoseg"), metrics.get("split")
    stages = {"stage1_projected": "right after the projection, not yet fine-tuned"}
    if method == "scaleprotoseg":
        stages["stage1_finetuned"] = "stage 1 fine-tuned, without groups"
    tiles = {f"mIoU, {split} split, this run ({method})": metrics.get("miou")}
    tiles |= {text: miou_of(metrics, stage) for stage, text in stages.items() if stage in metrics}
    dataset = (metrics.get("settings") or {}).get("dataset", "cityscapes")
    name, printed = PRINTED.get(dataset, PRINTED["cityscapes"])
    if method in printed and dataset != "folder":                      # the paper has no number for it
        tiles[f"mIoU of the paper on {name} ({NAMES[method]})"] = printed[method]
    return tiles


def miou_of(metrics, stage):
    """mIoU of a stage, or None."""
    return (metrics.get(stage) or {}).get("miou")


def advice(metrics):
    """Sentences on what is to be looked at."""
    found = []
    lacking = metrics.get("absent_classes") or []
    unseen, rates = [*lacking, *(metrics.get("absent") or [])], metrics.get("iou") or {}
    known = {name: iou for name, iou in rates.items() if iou is not None and name not in unseen}
    poor = [f"{name} {iou:.1f} %" for name, iou in known.items() if iou < 2]
    if poor:
        how = "train longer." if metrics.get("method") == "deeplab" else \
            "<code>--failure CLASS</code> draws what the network takes such a class for."
        found.append(f"The IoU is below 2 % in {len(poor)} of {len(known)} classes "
                     f"({html.escape(some_of(poor))}). If they are rare, they are learned late "
                     f"(learning.png): {how}")
    first = metrics.get("prototypes_at_first") or 0
    gone = {text: metrics.get(key) or 0 for key, text in GONE.items()}
    left = first - sum(gone.values())
    if lacking or left < first / 2:
        counts = ", ".join(f"{count} {text}" for text, count in gone.items() if count)
        names = f": {html.escape(some_of(lacking, 10))}" if lacking else ""
        found.append(f"{left} of {first} prototypes outlived the projection (gone: {counts}{names}). With a "
                     "longer joint phase fewer become duplicates or are pruned; a class without images there "
                     "cannot be learned.")
    far = {name: len(of_class["moved_far"]) for name, of_class in (metrics.get("projection") or {}).items()}
    if sum(far.values()) > left / 5:
        most = [f"{name} {count}" for name, count in sorted(far.items(), key=lambda pair: -pair[1]) if count]
        found.append(f"{sum(far.values())} of {left} prototypes moved far at the projection "
                     f"({html.escape(some_of(most))}): no training patch shows what they had learned. Look "
                     "at prototypes-CLASS.png of these classes; more images of them help, or try "
                     "--log-prior.")
    members, overlap = metrics.get("group_average") or 0, metrics.get("group_overlap") or 0
    if members > 5 or overlap > 50:
        facts = [f"a group has {members:.1f} members (in the paper about 4)"] * (members > 5)
        facts += [f"groups of a class overlap by {overlap:.0f} % (in the paper by 28 to 43)"] * (overlap > 50)
        found.append(f"Groups are hard to read: {', and '.join(facts)}. Train stage 2 longer, or raise "
                     "--group-lr or --w-entropy; --stage1 trains the groups alone anew.")
    before, grouped, after = (miou_of(metrics, stage) for stage in
                              ("stage1_finetuned", "stage2", "stage2_thresholded"))
    if None not in (before, grouped, after) and before - after > 2:
        remedy = "train stage 2 longer, or raise --group-lr; --stage1 trains the groups alone anew."
        if grouped - after > before - grouped:
            remedy = "most of it is due to the threshold, so try a lower one with --eval-only --threshold."
        found.append(f"Groups cost {before - after:.1f} points of mIoU ({before:.1f} without them, "
                     f"{after:.1f} with them): {remedy}")
    scores = (metrics.get("part_metrics") or {}).get("0.7") or {}
    hits, chance = scores.get("hit_rate"), scores.get("hit_rate_chance")
    if None not in (hits, chance) and hits < chance + 3:
        found.append(f"Prototypes light up on their best part in {hits:.0f} % of the images that show it, "
                     f"random maps in {chance:.0f} % (part_metrics at 0.7): train longer before you call "
                     "them parts.")
    return found


PAGE = Page(
    script="scaleprotoseg",
    paper="Porta et al., <i>Multi-Scale Grouped Prototypes for Interpretable Semantic Segmentation</i> "
          "(ScaleProtoSeg), WACV 2025",
    headline=headline, advice=advice,
    numbers={
        "miou": "Mean over classes of TP / (TP + FP + FN), over all pixels of the split, by the network at "
                "its end: stage 2 after the threshold, ProtoSeg after fine-tuning. A class that neither "
                "labels nor predictions have is left out, and so is 255.",
        "macc": "Mean over classes of the share of their pixels that is found. Far above mIoU: rare classes "
                "are claimed too often.",
        "pixel_acc": "Share of labelled pixels that are right; frequent classes decide it.",
        "iou": "IoU by class. Where it is near 0, <code>--failure CLASS</code> shows why.",
        "absent": "Classes that the labels of this split lack.",
        "method": "scaleprotoseg: prototypes of each scale, then groups of them; protoseg: its ancestor, "
                  "with one summed scale and no groups; deeplab: the plain network. Our protoseg mends a "
                  "slip in the diversity loss of its authors' code, so what is printed of ProtoSeg is of "
                  "another loss.",
        "plain": "mIoU, pixel accuracy and IoU by class once more: the plain network has no stages.",
        "stage1_projected": "mIoU, pixel accuracy and IoU by class right after the projection, when a "
                            "weight of the last layer is still 1 for its own class and -0.5 for any other. "
                            "What the projection cost, log.csv tells: <code>val_miou</code> of its row "
                            "project beside the last row joint. A large fall means that prototypes had to "
                            "move far.",
        "stage1_finetuned": "The same after the fine-tuning of the last layer: what prototypes reach "
                            "without groups.",
        "stage2": "The same with groups, all of their weights kept. If it is some points below "
                  "stage1_finetuned, train stage 2 longer, or raise --group-lr.",
        "stage2_thresholded": "The same without the group weights below --threshold: the network as it "
                              "predicts. If it is some points below stage2, the threshold is too high.",
        "prototypes_at_first": "Prototypes before the projection: scales x classes x --prototypes, or "
                               "classes x --protoseg-prototypes in ProtoSeg.",
        "absent_classes": "Classes without a labelled pixel in the images that prototypes are projected to. "
                          "They have no prototype left and are hardly ever predicted.",
        "pruned": "Prototypes that ProtoSeg drops, as fewer than 3 of their 6 nearest patches are of their "
                  "class; 0 in ScaleProtoSeg. If there are many, train longer: they do not yet stand for "
                  "their class.",
        "of_absent_classes": "Prototypes that were dropped because their class is one of absent_classes.",
        "duplicates": "Prototypes that were dropped because another one of their class and scale had become "
                      "the same patch. If there are many, training was too short or --w-diversity is too "
                      "low.",
        "projection": "Of each class the median squared <code>distance</code> from its prototypes to the "
                      "patches that they became, and the prototypes that <code>moved_far</code>, over 4 "
                      "times the median of all (our rule): they had learned something that no patch of their "
                      "class shows. Rare classes often have such. <code>--log-prior</code> takes one reason "
                      "away: without a bias, distance is how the network says that a class is rare.",
        "prototypes": "Prototypes in use: those with a weight in some group after the threshold, or all "
                      "that are left where there are no groups. The paper uses 111 of at most 228 on "
                      "Cityscapes (Tables 7, 8).",
        "mean_abs_weight": "Mean size of the weights of the last layer, that behind the groups if there are "
                           "any (Table 10: 0.07 on Cityscapes, 0.52 in ProtoSeg). It starts a little above "
                           "0.5; the lower it is, the more a logit rests on what belongs to its own class.",
        "extra_parameters": "Numbers to be stored beyond backbone and ASPP: prototypes in use, group "
                            "weights that are not 0, last layer (Table 10).",
        "group_average": "Mean number of members of a group after the threshold, of at most scales x "
                         "--prototypes (Tables 7, 8). The paper has 3.4 to 4.1, and about 6 without the "
                         "entropy loss, which is too many to read.",
        "part_metrics": "Is a prototype a part, in all test images, by the quantile above which its map "
                        "counts as lit? <code>hit_rate</code>: the share of the images with its best part "
                        "in which it is lit there; <code>consistency</code>: percent of prototypes with a "
                        "hit rate above 80 %; <code>stability</code>: percent of all cases in which the lit "
                        "parts stay the same under noise, among them <code>stability_empty</code> without "
                        "any, which say nothing. Read the first two between <code>_ceiling</code> (the true "
                        "parts) and <code>_chance</code> (random maps): near chance, prototypes are no "
                        "parts.",
        "consistency": "The mean of that in part_metrics over --quantiles, as in the paper, whose quantiles "
                       "are not known. A few percent are usual, so look at ceiling and chance in "
                       "part_metrics. None where no part is shown often enough.",
        "consistency_by_quantile":
            "The same at each of --quantiles; the higher the quantile, the fewer pixels are lit.",
        "stability": "The mean of that in part_metrics over --quantiles, as in the paper. A high value "
                     "alone says little: what lights up on no part is stable, too "
                     "(<code>stability_empty</code> in part_metrics).",
        "stability_by_quantile": "The same at each of --quantiles.",
        "purity": "Is a prototype a part, at its best? Of the ten test images in which it is most similar "
                  "to a pixel of its class, the share that has the same annotated part there, mean over "
                  "prototypes (ours). If it is hardly above largest_part, prototypes know nothing of parts.",
        "largest_part": "Share of a class that its largest part covers. The purity of chance lies somewhat "
                        "above it, as purity takes the most frequent part of ten.",
        "group_overlap": "How much the groups of a class light up in the same place: intersection over "
                         "union of their 5 % brightest pixels (Table 9: 28 to 43 with the entropy loss, 47 "
                         "to 62 without). The higher, the more often they say the same. None where the "
                         "threshold leaves no group.",
        "equivariance": "Sec. 11, by p_th: <code>pairs</code> of prototypes of two scales that light up "
                        "alike (IoU above 0.5) if the image is shrunk to make up for it, merged into "
                        "<code>groups</code>, and the ratios of Fig. 7. Random maps do as well if "
                        "<code>mean_iou</code> of all pairs is no higher than <code>chance_iou</code>, "
                        "<code>above_chance</code> is near 50 or <code>pairs_by_chance</code> near the "
                        "number of pairs.",
        "threshold": "alpha: smaller group weights count as 0 in the final rates; nothing is trained again "
                     "(Sec. 9).",
        "images_per_second": "Whole test images a second, one at a time, from input to labels; the clock is "
                             "read when the device is done (Table 10). Compare only what the same idle "
                             "machine measured.",
        "iterations": "Training steps of each phase.",
    },
    columns={
        "lr": "learning rate of what comes first in the phase: the ASPP in warmup, the backbone in joint, "
              "then the last layer, the groups",
        "ce": "pixel cross-entropy; it may rise after the projection and where groups begin",
        "diversity": "diversity loss, with its weight: at --w-diversity the prototypes of a class and scale "
                     "light up alike, at 0 in different places",
        "l1": "L1 of the last layer's weights for other classes, with its weight",
        "entropy": "entropy of the group weights, with its weight: at --w-entropy all members count alike, "
                   "at 0 only one",
        "val_miou": "on the val split, by the network as it stands; the smaller the fall at the projection, "
                    "the better",
        "val_pixel_acc": "on the val split",
    },
    shown={
        "examples.png": "Image, label, prediction (ours).",
        "learning.png": "Val IoU of the six classes with the fewest training pixels; with --table 5 of the "
                        "three methods below each other. A line that stays at 0 is a class that is not "
                        "learned yet, one that still rises asks for a longer training, and one that falls at "
                        "the projection has prototypes that moved far (ours).",
        "prototypes-*.png": "Every prototype of a class, a scale after the other: the training patch that it "
                            "is (framed), and how similar to it that image is. It is good if only what is "
                            "like the patch is red, and bad if other classes are; <i>moved far</i> means "
                            "that it had learned something else, <i>no group</i> that it is not used (ours).",
        "groups-*.png": "Every group of a class on a test image, and right of it the members that add most. "
                        "It is good if the groups light up on different parts of the class and the members "
                        "of a group on the same one; it is bad if the groups are alike, or red outside the "
                        "class (Fig. 11 to 13, 26).",
        "nearest_patches.png": "A prototype of each class, and the test patches that are most similar to "
                               "it. They should show the same thing and be on the class itself; another "
                               "class below a patch is a confusion (Fig. 14 to 19).",
        "nearest_prototypes-*.png":
            "Random cells of a test image, and the three prototypes most similar to each. They should be of "
            "the cell's class and show the same thing; where all similarities are near 0, no prototype fits "
            "(Fig. 20 to 25).",
        "part_metrics.png": "Is a prototype a part? The nearer its curves lie to those of the true parts, "
                            "the better; on those of random maps it knows nothing of parts, and stability "
                            "counts only where few light up on no part (ours).",
        "equivariance.png": "How many prototypes of two scales say the same of large and small objects "
                            "(Fig. 7). In the paper over half of the classes of Cityscapes and Pascal have "
                            "such groups at 0.6, on ADE20K 12 %; compare with <code>pairs_by_chance</code> "
                            "below.",
        "equivariant_pairs.png": "The best of these pairs in each class: both patches (framed), and in "
                                 "colour what each of the two sees. It is good if both colour the same part "
                                 "of an object; in an even area such as the sky it says little (Fig. 8 to "
                                 "10).",
        "entropy.png": "Groups of some classes, trained without the entropy loss (left) and with it (right) "
                       "on the same prototypes. With it they should light up in different places (Fig. 6).",
    },
    commands={
        "python scaleprotoseg.py --explain photo.jpg --out OUT":
            "Why has a pixel of your photo this class and not the next best one? Groups, or the prototypes "
            "of ProtoSeg, are added up and drawn (the plain network has neither); --class, --against and "
            "--pixel X Y choose what is asked.",
        "python scaleprotoseg.py --table 5 --out runs/three":
            "The plain network, ProtoSeg and ScaleProtoSeg with the same schedule, without which the number "
            "above says little. It takes about 5 min on toy scenes; for other data add --preset and --data "
            "of this run.",
        "python scaleprotoseg.py --stage1 OUT --w-entropy 0.3 --out runs/sparser":
            "Sparser groups of the same prototypes (a run of ScaleProtoSeg): how much mIoU does a shorter "
            "explanation cost? For other data than toy scenes add --preset and --data of this run.",
    })
