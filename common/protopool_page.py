"""What report.html says of a run of protopool.py: its numbers, columns, figures and next commands."""
from common.report import Page

PAPER = {                                                            # Tables 1 and 7: recipe: what, accuracy
    "cub-r34": ("CUB-200-2011, ResNet-34", 80.3), "cub-r152": ("CUB-200-2011, ResNet-152", 81.5),
    "cub-r50-inat": ("CUB-200-2011, ResNet-50 of iNaturalist", 85.5),
    "cub-d121": ("CUB-200-2011, DenseNet-121", 73.6), "cub-d161": ("CUB-200-2011, DenseNet-161", 80.3),
    "cars-r34": ("Stanford Cars, ResNet-34", 89.3), "cars-r50": ("Stanford Cars, ResNet-50", 88.9),
    "cars-d121": ("Stanford Cars, DenseNet-121", 86.4),
}


def headline(metrics):
    """{what it is: percent}, ours first; the metrics of a run or of an ensemble."""
    ours, rates = metrics.get("accuracy"), metrics.get("accuracies")
    if rates:
        return {f"accuracy of the mean probabilities of {len(rates)} runs, test split": ours,
                "mean accuracy of the single runs": sum(rates) / len(rates),
                **{"accuracy of the paper: "
                   f"{name}": rate for name, rate in (metrics.get("paper") or {}).items()}}
    split = f"{metrics.get('split', 'test')} split"
    if str(metrics.get("chosen_on")).startswith("test"):
        split += ", which also decided when to stop: optimistic"
    if metrics.get("classifier") == "linear":
        return {f"accuracy, {split}, this run with a linear layer": ours}
    tiles = {f"accuracy, {split}, this run": ours,
             "before the prototypes became training patches": metrics.get("accuracy_before_projection"),
             "right after it, the last layer not yet fine-tuned": metrics.get("accuracy_after_projection")}
    name, paper = PAPER.get(metrics.get("preset"), PAPER["cub-r34"])
    own = (metrics.get("settings") or {}).get("dataset") == "imagefolder"           # the paper has no number
    return tiles if own else tiles | {f"accuracy of the paper ({name})": paper}


def advice(metrics):
    """Sentences on what is to be looked at; the metrics of a run or of an ensemble."""
    found = []
    ours, rates = metrics.get("accuracy"), metrics.get("accuracies") or []
    settings = metrics.get("settings") or {}
    if len(rates) > 1 and ours is not None and ours <= max(rates) < 100:
        found.append(f"The mean probabilities ({ours:.1f} %) are not better than the best run "
                     f"({max(rates):.1f} %): the runs make the same mistakes, or one of them is much weaker "
                     "than the others.")
    count = metrics.get("slots_in_all")
    if count and settings and ours is not None:
        chance = 100 * settings.get("slots", 10) / count                # 10 is the default of --slots
        if ours < chance + 0.15 * (100 - chance):
            more = "" if (settings.get("add_on_decay") or 0) >= 0.03 else (
                " If <code>ce</code> is low all the same, the add-on layer has learned few images by heart, "
                "against which <code>--add-on-decay 0.03 --lr 5e-4 --w-cluster 0.1 --w-separation "
                "-0.01</code> helps.")
            found.append(f"An accuracy of {ours:.1f} % is near chance ({chance:.1f} %): train longer.{more}")
    before, after = (metrics.get(f"accuracy_{stage}_projection") for stage in ("before", "after"))
    if before is not None and after is not None and before - after > 3:
        is_noisy = settings.get("prototype_noise", 0) >= 0.03
        noise = "" if is_noisy else "<code>--prototype-noise</code> (to 0.03) or "
        found.append(f"The projection costs {before - after:.1f} points, as the classes hang on where "
                     f"exactly prototypes lie: raise {noise}<code>--prototypes</code>.")
    tries = "" if settings.get("tau") == "geometric" else "<code>--tau geometric</code>, "
    tries += "" if settings.get("slot_lr", 0) >= 0.02 else "<code>--slot-lr 0.02</code>, "
    tries += "more epochs or a larger <code>--w-orth</code>"
    repeated, empty = metrics.get("repeated_slots") or 0, metrics.get("empty_slots") or 0
    if count and repeated + empty > 0.05 * count:
        found.append(f"Of {count} slots {repeated} repeat a prototype of their class and {empty} are empty, "
                     f"which wastes them: try {tries}.")
    graph = metrics.get("graph_correlation")
    if graph is not None and graph < 0.35:
        is_patches = settings.get("prototypes_from") == "patches"
        start = "" if is_patches else "<code>--prototypes-from patches</code>, "
        found.append("What species share says little about what they have in common "
                     f"(<code>graph_correlation</code> {graph:.2f}): mostly the slots froze before images "
                     f"could choose (<code>slots_changed</code> is 0 early). Try {start}{tries}.")
    used, distinct = metrics.get("prototypes_used"), metrics.get("distinct_patches")
    if used and distinct and distinct < 0.8 * used:
        found.append(f"The {used} prototypes are only {distinct} different patches: two reasons of an "
                     "explanation can be one and the same. Try a smaller <code>--prototypes</code>.")
    if metrics.get("classifier") == "protopool" and "purity" not in metrics:
        found.append("These data have no part annotations: purity, consistency and stability, which tell "
                     "whether a box can be believed, could not be measured (CUB and toy birds have them).")
    purity, by_chance, stability = map(metrics.get, ("purity", "purity_by_chance", "stability"))
    if purity is not None and by_chance is not None and purity - by_chance < 15:
        found.append(f"A purity of {purity:.1f} is not clearly above that of boxes on other images "
                     f"({by_chance:.1f}): the prototypes do not show one part each. Train longer, or take a "
                     "backbone whose cells see less.")
    if stability is not None and stability < 60:
        found.append(f"A little noise changes the parts in {100 - stability:.0f} % of the boxes: read a box "
                     "as a hint at a place, not as the name of a part. More <code>--joint-epochs</code> may "
                     "help.")
    return found


PAGE = Page(
    script="protopool",
    paper="Rymarczyk et al., <i>Interpretable image classification with differentiable prototypes "
          "assignment</i> (ProtoPool), ECCV 2022",
    headline=headline, advice=advice,
    numbers={
        "accuracy": "Share of test images whose most likely class is right, at the end; of an ensemble, "
                    "that of the mean of its runs' probabilities. A linear layer on the same backbone "
                    "(<code>--classifier linear</code>) tells what the explanations cost.",
        "accuracy_before_projection": "The same images and hard slots with the prototypes as they were "
                                      "learned, before they became training patches. The last layer still "
                                      "holds 0 and 1.",
        "accuracy_after_projection": "The same with prototypes that are training patches, before "
                                     "fine-tuning. More than 3 points below accuracy_before_projection are a "
                                     "reason to worry.",
        "classifier": "protopool: slots and prototypes; linear: an ordinary linear layer on the same "
                      "backbone, which has none, and so none of their numbers.",
        "split": "Images that the rates are of, read at the end alone unless chosen_on says otherwise.",
        "reading": "paper, or official: the authors' released code where it differs from the print.",
        "chosen_on": "Images that decided when the joint phase stops. If these are the test split, which is "
                     "what the authors' code does, the accuracy is optimistic.",
        "epochs": "Epochs made in each phase. Fewer joint ones than <code>--joint-epochs</code>: early "
                  "stopping ended it.",
        "prototypes_used": "Prototypes in at least one slot.",
        "distinct_patches": "Different training patches among the prototypes that were kept: two may have "
                            "become the same one, and then give one reason twice.",
        "prototypes_pruned": "Prototypes of the pool that were in no slot, and were dropped. If there are "
                             "none, the pool may be too small.",
        "slots_in_all": "Classes times <code>--slots</code>; the two counts of slots below are of these.",
        "empty_slots": "Slots in which no prototype had more than half of the probability; they add nothing "
                       "to a logit. 0 is usual.",
        "repeated_slots": "Slots that hold a prototype which an earlier slot of their class holds. Above a "
                          "twentieth of all, the slots are wasted.",
        "classes_per_prototype": "How many classes hold a prototype, mean over those that are used. 1 would "
                                 "be no sharing, as in ProtoPNet.",
        "classes_of_each_prototype": "The same of every prototype, p0 first (Fig. 9).",
        "shared_per_class_pair": "Prototypes that two classes have in common, mean over all pairs (Fig. 13).",
        "negative_weights": "Weights of the last layer below 0 after fine-tuning: slots that speak against "
                            "a class, though the paper wants reasons for it alone. <code>--positive</code> "
                            "leaves none.",
        "off_class_weight": "Mean size of the last layer's weights from slots of other classes, 0 before "
                            "fine-tuning. The larger it is, the less a class's own slots explain.",
        "explanations": "Three test images as in Fig. 6: similarity x weight = product of every own slot, "
                        "their sum <code>own</code>, and <code>rest</code> of all other classes' slots; own "
                        "+ rest = logit. If rest is not small beside own, the shown patches are not the "
                        "whole reason.",
        "purity": "Is an explanation true? Of the ten test images where a prototype is most similar, the "
                  "share whose box (95th percentile of the activation) holds the same annotated part; mean "
                  "over prototypes. Compare it with the next line only.",
        "purity_by_chance": "The same boxes laid on other test images: what their size and place reach "
                            "alone. Purity near it means that prototypes show no part.",
        "consistency": "Percent of prototypes whose box holds one and the same part in at least 80 % of the "
                       "test images of their classes that show this part (Huang et al., ICCV 2023).",
        "consistency_home": "The same in the images of the class that the patch was cut from. A home has "
                            "few images, so one part reaches 80 % more easily: compare only with the same "
                            "number of another run.",
        "consistency_guests": "The same in the images of the other classes that hold the prototype. Far "
                              "below that of another run: sharing is in name only. None if no prototype is "
                              "shared.",
        "stability": "Percent of pairs of a test image and a prototype of its class whose box holds the "
                     "same parts when noise of 0.2 is added to the network's input. Below 60, do not trust "
                     "single boxes.",
        "box_area": "Mean size of a box in percent of the image. Large boxes make purity easy, and raise "
                    "purity_by_chance too.",
        "parts_per_box": "Annotated parts in a box, mean. Near 1, a box names a part; above 2, it is a "
                         "region.",
        "variant_purity": "Toy birds: purity for the same part in the same variant, such as a striped wing "
                          "and not just any wing.",
        "variants": "Toy birds: how many variants of parts there are to be found.",
        "true_slots": "Toy birds: percent of the filled slots whose species has the variant that their "
                      "prototype shows in most of its ten most similar birds. Slots that chance filled reach "
                      "about 68.",
        "graph_correlation": "Toy birds: correlation, over pairs of species, of the prototypes and the "
                             "variants that they have in common. 1: they share what they have in common; "
                             "near 0: sharing is chance. None where all pairs share alike.",
        "shared_with_variant": "Toy birds: prototypes in common, mean over the pairs of species that have a "
                               "variant in common.",
        "shared_without_variant": "Toy birds: the same over pairs without one. It should lie far below the "
                                  "line before.",
        "runs": "Runs whose probabilities were averaged (<code>--ensemble</code>).",
        "accuracies": "Accuracy of each of these runs alone, in their order.",
        "paper": "What ensembles reach in Table 1. How the paper averages, it does not say.",
    },
    columns={
        "lr": "learning rate of the add-on layer (of the linear layer where there is none), then of the "
              "last layer",
        "ce": "cross-entropy, mean over the epoch; it jumps where slots replace the linear layer of the "
              "pretraining",
        "cluster": "L_clst with its weight: distance of the nearest patch to an own prototype; it should "
                   "fall",
        "separation": "L_sep with its weight, below 0: the lower, the farther are other classes' prototypes",
        "orth": "L_orth with its weight: near 0 if the slots of a class hold different prototypes; the "
                "official reading goes below 0",
        "l1": "L1 norm of the last layer off the own slots, with its weight; fine-tuning alone",
        "val_accuracy": "accuracy on the split of chosen_on, hard slots; low while these are still mixtures",
        "val_ce": "cross-entropy there; its lowest value in the joint phase decides when to stop",
        "slots_changed": "slots that prefer another prototype than an epoch before; if it is near 0 by the "
                         "third epoch of the warm-up, chance has filled the slots",
    },
    shown={
        "explanation-*.png": "Why this class? Each own slot: training patch, where it is found, similarity x "
                             "weight; the sum and the rest make the logit (Fig. 6). The bright spot should "
                             "lie on the part that the patch shows. A red frame is a false slot (toy birds).",
        "classes-*.png": "Each class and the patches in its slots, with the classes that share them (Fig. "
                         "7). On toy birds a red frame is a false slot: the species lacks what the prototype "
                         "shows. Many red frames mean that chance filled the slots.",
        "prototypes-*.png": "Each prototype as a patch, its box and activation on its training image, and "
                            "the patches of the five nearest training images (Supp. 9). Five times the same "
                            "part is good; background or changing parts are bad.",
        "shared_pair.png": "The two classes that share most: own prototypes of each, and those of both "
                           "(Fig. 1). What is shared should be visible on both portraits.",
        "pair-*.png": "The two classes of <code>--compare</code>: own prototypes of each, and those of both "
                      "(Fig. 1).",
        "shared_prototype.png": "The prototype that most classes hold, and these classes (Fig. 8). All of "
                                "them should have what the patch shows.",
        "class_graph.png": "Prototypes that each two classes have in common, of an ensemble the mean over "
                           "its runs (Fig. 13). On toy birds the truth stands beside it, variants in common: "
                           "both should be bright in the same cells.",
        "classes_per_prototype.png": "How many prototypes are held by 1, 2, ... classes (Fig. 9); of an "
                                     "ensemble every run, and their mean and deviation. The farther right "
                                     "the bars, the more is shared; if all stand at 1, nothing is.",
        "slot_over_time.png": "One slot at the start, half-way and at the end (Fig. 5): even, then "
                              "undecided, then a single bar at 1.",
        "slots_over_time.png": "Slots of the first class while they learn, step by step (Fig. 5 as a film): "
                               "dark at first, then one prototype a slot wins. A winner within the first "
                               "steps is chance.",
        "assignment.png": "Slots of up to ten classes (columns) by prototype (rows) at the end of training "
                          "(Fig. 14). One bright cell a column is good; a bright row within a class is a "
                          "repeated prototype. The rows at the bottom were pruned.",
        "assignment_histogram.png": "Values of the slots' distributions, counts on a logarithmic axis (Fig. "
                                    "15). Bars at 0 and 1 alone are good; values between them are mixtures, "
                                    "which hard slots lose.",
        "focal.png": "The strongest own prototype on five images: image, activation, both; maximum - mean = "
                     "focal similarity (Fig. 2, 4). A small bright spot on the object is good, a bright "
                     "background is bad.",
        "focal_histogram.png": "Similarity of test images to all prototypes of this network, focal and as "
                               "maximum alone. Low values for most images and a tail, or a second hump, of "
                               "high ones is good: a part is seen in few of them (the paper's Fig. 17 has "
                               "two humps). figure17.png of <code>--table 4</code> has two networks.",
        "figure11a.png": "Accuracy by the size of the pool (Fig. 11). The paper's curve is flat from about "
                         "200 on; where ours flattens, more prototypes gain nothing.",
        "figure11b.png": "Accuracy by the slots of a class (Fig. 11). The paper's curve is flat from about "
                         "10 on; where ours flattens, more slots gain nothing.",
        "figure2.png": "The strongest own prototype, trained with focal similarity and with the maximum "
                       "alone (Fig. 2). The paper's claim holds if the spots of the first are smaller.",
        "figure14.png": "Slots before they are fixed, in four settings (Fig. 14). Without orthogonality "
                        "bright cells stand in rows, without Gumbel-softmax they are dim.",
        "figure15.png": "Values of the slots' distributions in the same settings (Fig. 15). The paper has "
                        "bars at 0 and 1 alone only in the full model.",
        "figure17.png": "Similarity to all prototypes, trained with focal similarity and with the maximum "
                        "alone (Fig. 17). In the paper the first has two humps, the second one.",
    },
    commands={
        "python protopool.py --classifier linear --out runs/plain":
            "A linear layer on the same backbone at the same budget: what the explanations cost. Give it the "
            "<code>--preset</code> and <code>--data</code> of this run.",
        "python protopool.py --explain bird.jpg --out OUT":
            "Why does this network name your picture as it does? A folder of pictures will do; <code>python "
            "-m data.toy_birds --out runs/toy_birds</code> writes toy birds. A linear layer explains "
            "nothing.",
        "python protopool.py --table 4":
            "The paper's ablation on toy birds: what orthogonality, Gumbel-softmax and focal similarity are "
            "good for.",
    })
